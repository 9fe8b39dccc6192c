"""gradmaker: gradient preconditioning as curvature x representation x solver."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parents[1]
if (_root / "setup.cfg").is_file():  # a checkout: curvature/, representations/ and solvers/ sit beside this folder
    __path__ = [str(_root / "gradmaker"), str(_root)]
del _root

from gradmaker.compare import Comparison, Data, compare  # noqa: E402
from gradmaker.config import GradientConfig  # noqa: E402
from gradmaker.maker import GradientMaker, PlainGradientConfig  # noqa: E402
from gradmaker.methods import METHODS, from_config  # noqa: E402
from gradmaker.methods.custom import CustomGradientConfig, CustomGradientMaker  # noqa: E402
from gradmaker.methods.eigen_kronecker import (  # noqa: E402  # noqa: E402
    EshampooGradientConfig,
    EshampooGradientMaker,
    SoapGradientConfig,
    SoapGradientMaker,
)
from gradmaker.methods.elementwise import (  # noqa: E402
    AdagradGradientConfig,
    AdagradGradientMaker,
    AdamGradientConfig,
    AdamGradientMaker,
)
from gradmaker.methods.fisher_kronecker import (  # noqa: E402
    EkfacGradientConfig,
    EkfacGradientMaker,
    KflrGradientConfig,
    KflrGradientMaker,
    KfraGradientConfig,
    KfraGradientMaker,
    SkfacGradientConfig,
    SkfacGradientMaker,
    TntGradientConfig,
    TntGradientMaker,
)
from gradmaker.methods.inverse_kronecker import (  # noqa: E402  # noqa: E402  # noqa: E402
    KlShampooGradientConfig,
    KlShampooGradientMaker,
    KradagradGradientConfig,
    KradagradGradientMaker,
    KradagradStarGradientConfig,
    KradagradStarGradientMaker,
)
from gradmaker.methods.kronecker import (  # noqa: E402
    KfacGradientConfig,
    KfacGradientMaker,
    ShampooGradientConfig,
    ShampooGradientMaker,
)
from gradmaker.methods.low_rank import (  # noqa: E402
    GgtGradientConfig,
    GgtGradientMaker,
    MfacGradientConfig,
    MfacGradientMaker,
    SengGradientConfig,
    SengGradientMaker,
    SmwGaussNewtonGradientConfig,
    SmwGaussNewtonGradientMaker,
    SmwNaturalGradientConfig,
    SmwNaturalGradientMaker,
    TongaGradientConfig,
    TongaGradientMaker,
    TongaUnitGradientConfig,
    TongaUnitGradientMaker,
)
from gradmaker.methods.natural import (  # noqa: E402
    DiagonalNaturalGradientConfig,
    DiagonalNaturalGradientMaker,
    FullNaturalGradientConfig,
    FullNaturalGradientMaker,
    LayerNaturalGradientConfig,
    LayerNaturalGradientMaker,
    UnitNaturalGradientConfig,
    UnitNaturalGradientMaker,
)
from gradmaker.methods.spectral import MuonGradientConfig, MuonGradientMaker  # noqa: E402
from gradmaker.methods.tensor_kronecker import (  # noqa: E402  # noqa: E402  # noqa: E402
    CasprGradientConfig,
    CasprGradientMaker,
    FullAdagradGradientConfig,
    FullAdagradGradientMaker,
    OneSidedGradientConfig,
    OneSidedGradientMaker,
)
from gradmaker.preconditioner import PreconditionedGradientMaker  # noqa: E402
from gradmaker.triple import Triple, TripleError, legality  # noqa: E402

__all__ = [
    "METHODS",
    "AdagradGradientConfig",
    "AdagradGradientMaker",
    "AdamGradientConfig",
    "AdamGradientMaker",
    "CasprGradientConfig",
    "CasprGradientMaker",
    "Comparison",
    "CustomGradientConfig",
    "CustomGradientMaker",
    "Data",
    "DiagonalNaturalGradientConfig",
    "DiagonalNaturalGradientMaker",
    "EkfacGradientConfig",
    "EkfacGradientMaker",
    "EshampooGradientConfig",
    "EshampooGradientMaker",
    "FullAdagradGradientConfig",
    "FullAdagradGradientMaker",
    "FullNaturalGradientConfig",
    "FullNaturalGradientMaker",
    "GgtGradientConfig",
    "GgtGradientMaker",
    "GradientConfig",
    "GradientMaker",
    "KfacGradientConfig",
    "KfacGradientMaker",
    "KflrGradientConfig",
    "KflrGradientMaker",
    "KfraGradientConfig",
    "KfraGradientMaker",
    "KlShampooGradientConfig",
    "KlShampooGradientMaker",
    "KradagradGradientConfig",
    "KradagradGradientMaker",
    "KradagradStarGradientConfig",
    "KradagradStarGradientMaker",
    "LayerNaturalGradientConfig",
    "LayerNaturalGradientMaker",
    "MfacGradientConfig",
    "MfacGradientMaker",
    "MuonGradientConfig",
    "MuonGradientMaker",
    "OneSidedGradientConfig",
    "OneSidedGradientMaker",
    "PlainGradientConfig",
    "PreconditionedGradientMaker",
    "SengGradientConfig",
    "SengGradientMaker",
    "ShampooGradientConfig",
    "ShampooGradientMaker",
    "SkfacGradientConfig",
    "SkfacGradientMaker",
    "SmwGaussNewtonGradientConfig",
    "SmwGaussNewtonGradientMaker",
    "SmwNaturalGradientConfig",
    "SmwNaturalGradientMaker",
    "SoapGradientConfig",
    "SoapGradientMaker",
    "TntGradientConfig",
    "TntGradientMaker",
    "TongaGradientConfig",
    "TongaGradientMaker",
    "TongaUnitGradientConfig",
    "TongaUnitGradientMaker",
    "Triple",
    "TripleError",
    "UnitNaturalGradientConfig",
    "UnitNaturalGradientMaker",
    "compare",
    "from_config",
    "legality",
]
__version__ = "0.1.0"
