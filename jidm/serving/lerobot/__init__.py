"""jidm as a policy of LeRobot, type "jidm": `--policy.discover_packages_path=jidm.serving.lerobot`.

Needs LeRobot 0.4 or later. Importing this package registers the policy. LeRobot's factories find its parts by the names of
the modules, classes and functions.
"""

from jidm.errors import MissingExtraError

try:
    import lerobot  # noqa: F401
except ImportError:
    raise MissingExtraError("a policy of LeRobot", "lerobot", None) from None

from jidm.serving.lerobot.configuration_jidm import JidmConfig
from jidm.serving.lerobot.modeling_jidm import JidmPolicy
from jidm.serving.lerobot.processor_jidm import make_jidm_pre_post_processors

__all__ = ["JidmConfig", "JidmPolicy", "make_jidm_pre_post_processors"]
