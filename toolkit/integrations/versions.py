"""The installed version of another trainer, compared with the one that the tests ran with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from toolkit.errors import ConfigError, warn_once


def check_version(distribution: str, tested: str) -> str:
    """Return the installed version of a package; warn once if its first two numbers are not those that were tested.

    Args:
        distribution: its name, such as ``trl``.
        tested: the version that the tests ran with.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        installed = version(distribution)
    except PackageNotFoundError:
        raise ConfigError(f"{distribution} is not installed; pip install {distribution}=={tested}") from None
    if installed.split(".")[:2] != tested.split(".")[:2]:
        warn_once(
            f"toolkit.integrations was tested with {distribution} {tested}, but {installed} is installed; compare one "
            f"step with {distribution}'s own loss, or pip install {distribution}=={tested}"
        )
    return installed
