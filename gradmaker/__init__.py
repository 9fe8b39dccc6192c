"""gradmaker: gradient preconditioning as curvature x representation x solver."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parents[1]
if (_root / "setup.cfg").is_file():  # a checkout: curvature/, representations/ and solvers/ sit beside this folder
    __path__ = [str(_root / "gradmaker"), str(_root)]
del _root

from gradmaker.config import GradientConfig  # noqa: E402
from gradmaker.maker import GradientMaker, PlainGradientConfig  # noqa: E402
from gradmaker.methods import METHODS, from_config  # noqa: E402
from gradmaker.methods.custom import CustomGradientConfig, CustomGradientMaker  # noqa: E402
from gradmaker.methods.elementwise import (  # noqa: E402
    AdagradGradientConfig,
    AdagradGradientMaker,
    AdamGradientConfig,
    AdamGradientMaker,
)
from gradmaker.methods.kronecker import (  # noqa: E402
    KfacGradientConfig,
    KfacGradientMaker,
    ShampooGradientConfig,
    ShampooGradientMaker,
)
from gradmaker.methods.natural import (  # noqa: E402
    FullNaturalGradientConfig,
    FullNaturalGradientMaker,
    UnitNaturalGradientConfig,
    UnitNaturalGradientMaker,
)
from gradmaker.preconditioner import PreconditionedGradientMaker  # noqa: E402
from gradmaker.triple import Triple, TripleError, legality  # noqa: E402

__all__ = [
    "METHODS",
    "AdagradGradientConfig",
    "AdagradGradientMaker",
    "AdamGradientConfig",
    "AdamGradientMaker",
    "CustomGradientConfig",
    "CustomGradientMaker",
    "FullNaturalGradientConfig",
    "FullNaturalGradientMaker",
    "GradientConfig",
    "GradientMaker",
    "KfacGradientConfig",
    "KfacGradientMaker",
    "PlainGradientConfig",
    "PreconditionedGradientMaker",
    "ShampooGradientConfig",
    "ShampooGradientMaker",
    "Triple",
    "TripleError",
    "UnitNaturalGradientConfig",
    "UnitNaturalGradientMaker",
    "from_config",
    "legality",
]
__version__ = "0.1.0"
