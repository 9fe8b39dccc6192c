"""gradmaker: gradient preconditioning as curvature x representation x solver."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parents[1]
if (_root / "setup.cfg").is_file():  # a checkout: curvature/, representations/ and solvers/ sit beside this folder
    __path__ = [str(_root / "gradmaker"), str(_root)]
del _root

from gradmaker.compare import Comparison, Data, compare  # noqa: E402
from gradmaker.config import GradientConfig  # noqa: E402
from gradmaker.cost_report import cost_report  # noqa: E402
from gradmaker.damping_sweep import damping_sweep  # noqa: E402
from gradmaker.maker import GradientMaker, PlainGradientConfig  # noqa: E402
from gradmaker.methods import METHODS, from_config  # noqa: E402
from gradmaker.methods.caspr_adaptive import CasprAdaptiveGradientConfig, CasprAdaptiveGradientMaker  # noqa: E402
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
from gradmaker.methods.full_adagrad import FullAdagradGradientConfig, FullAdagradGradientMaker  # noqa: E402
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
from gradmaker.methods.matrix_free import (  # noqa: E402
    CurveballGradientConfig,
    CurveballGradientMaker,
    HessianFreeGradientConfig,
    HessianFreeGradientMaker,
    KsdGradientConfig,
    KsdGradientMaker,
    NewtonGradientConfig,
    NewtonGradientMaker,
    SaddleFreeGradientConfig,
    SaddleFreeGradientMaker,
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
from gradmaker.methods.probes import (  # noqa: E402
    AdahessianGradientConfig,
    AdahessianGradientMaker,
    EsgdGradientConfig,
    EsgdGradientMaker,
    PsgdGradientConfig,
    PsgdGradientMaker,
    PsgdKfGradientConfig,
    PsgdKfGradientMaker,
    PsgdWhitenGradientConfig,
    PsgdWhitenGradientMaker,
    SaddleFreeDiagonalGradientConfig,
    SaddleFreeDiagonalGradientMaker,
)
from gradmaker.methods.secants import (  # noqa: E402
    KbfgsGradientConfig,
    KbfgsGradientMaker,
    KbfgsLGradientConfig,
    KbfgsLGradientMaker,
    LbfgsGradientConfig,
    LbfgsGradientMaker,
)
from gradmaker.methods.series import (  # noqa: E402
    LissaGradientConfig,
    LissaGradientMaker,
    NeumannGradientConfig,
    NeumannGradientMaker,
    NeumannPracticalGradientConfig,
    NeumannPracticalGradientMaker,
)
from gradmaker.methods.sparse_inverse import FangGradientConfig, FangGradientMaker  # noqa: E402
from gradmaker.methods.spectral import MuonGradientConfig, MuonGradientMaker  # noqa: E402
from gradmaker.methods.tensor_kronecker import (  # noqa: E402  # noqa: E402  # noqa: E402
    CasprGradientConfig,
    CasprGradientMaker,
    OneSidedGradientConfig,
    OneSidedGradientMaker,
)
from gradmaker.preconditioner import PreconditionedGradientMaker  # noqa: E402
from gradmaker.triple import Triple, TripleError, legality  # noqa: E402

__all__ = [
    "METHODS",
    "AdagradGradientConfig",
    "AdagradGradientMaker",
    "AdahessianGradientConfig",
    "AdahessianGradientMaker",
    "AdamGradientConfig",
    "AdamGradientMaker",
    "CasprAdaptiveGradientConfig",
    "CasprAdaptiveGradientMaker",
    "CasprGradientConfig",
    "CasprGradientMaker",
    "Comparison",
    "CurveballGradientConfig",
    "CurveballGradientMaker",
    "CustomGradientConfig",
    "CustomGradientMaker",
    "Data",
    "DiagonalNaturalGradientConfig",
    "DiagonalNaturalGradientMaker",
    "EkfacGradientConfig",
    "EkfacGradientMaker",
    "EsgdGradientConfig",
    "EsgdGradientMaker",
    "EshampooGradientConfig",
    "EshampooGradientMaker",
    "FangGradientConfig",
    "FangGradientMaker",
    "FullAdagradGradientConfig",
    "FullAdagradGradientMaker",
    "FullNaturalGradientConfig",
    "FullNaturalGradientMaker",
    "GgtGradientConfig",
    "GgtGradientMaker",
    "GradientConfig",
    "GradientMaker",
    "HessianFreeGradientConfig",
    "HessianFreeGradientMaker",
    "KbfgsGradientConfig",
    "KbfgsGradientMaker",
    "KbfgsLGradientConfig",
    "KbfgsLGradientMaker",
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
    "KsdGradientConfig",
    "KsdGradientMaker",
    "LayerNaturalGradientConfig",
    "LayerNaturalGradientMaker",
    "LbfgsGradientConfig",
    "LbfgsGradientMaker",
    "LissaGradientConfig",
    "LissaGradientMaker",
    "MfacGradientConfig",
    "MfacGradientMaker",
    "MuonGradientConfig",
    "MuonGradientMaker",
    "NeumannGradientConfig",
    "NeumannGradientMaker",
    "NeumannPracticalGradientConfig",
    "NeumannPracticalGradientMaker",
    "NewtonGradientConfig",
    "NewtonGradientMaker",
    "OneSidedGradientConfig",
    "OneSidedGradientMaker",
    "PlainGradientConfig",
    "PreconditionedGradientMaker",
    "PsgdGradientConfig",
    "PsgdGradientMaker",
    "PsgdKfGradientConfig",
    "PsgdKfGradientMaker",
    "PsgdWhitenGradientConfig",
    "PsgdWhitenGradientMaker",
    "SaddleFreeDiagonalGradientConfig",
    "SaddleFreeDiagonalGradientMaker",
    "SaddleFreeGradientConfig",
    "SaddleFreeGradientMaker",
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
    "cost_report",
    "damping_sweep",
    "from_config",
    "legality",
]
__version__ = "0.1.0"
