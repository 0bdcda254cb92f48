"""Options of the head: as keywords or at once, the same call; what makes no sense stops before any product."""

import inspect
import subprocess
import sys

import pytest
import torch

from toolkit.errors import ConfigError
from toolkit.head import HeadOptions, explain, fused_loss, token_logprobs
from toolkit.head.options import OPTION_NAMES


def call(**options):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 3, generator=draw), torch.randn(7, 3, generator=draw)
    labels = torch.tensor([0, 3, -1, 6, 2])
    return token_logprobs(hidden, weight, labels, ignore_idx=-1, **options)


def test_options_at_once_and_keywords_are_the_same_call():
    options = HeadOptions(chunk_size=2, temperature=0.7, softcap=3.0)
    by_keyword = call(chunk_size=2, temperature=0.7, softcap=3.0)
    torch.testing.assert_close(call(options=options), by_keyword, rtol=0, atol=0)
    # A keyword beside them has the last word, and the options are as they were.
    torch.testing.assert_close(call(options=options, temperature=1.0), call(softcap=3.0))
    assert options.temperature == 0.7
    assert not torch.equal(by_keyword, call(softcap=3.0))


@pytest.mark.parametrize("function", [token_logprobs, fused_loss, explain])
def test_help_and_completion_show_every_option(function):
    parameters = inspect.signature(function).parameters
    assert set(parameters) >= OPTION_NAMES | {"options"}
    assert parameters["chunk_size"].default == "auto"
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in OPTION_NAMES)


def test_a_slip_in_a_keyword_names_the_function():
    with pytest.raises(TypeError, match=r"token_logprobs.*temprature"):
        call(temprature=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk_size": 0}, "chunk_size=0 must be a number of tokens"),
        ({"chunk_size": True}, "chunk_size=True must be"),
        ({"chunk_bytes": 0}, "chunk_bytes=0 must be"),
        ({"chunk_bytes": 64, "chunk_size": 2}, "goes with chunk_size='auto', not with 2"),
        ({"retain_bytes": -1}, "retain_bytes=-1 must be"),
        ({"retain_bytes": 1.5}, "retain_bytes=1.5 must be"),
        ({"entropy": "yes"}, "entropy='yes' is unknown"),
        ({"entropy": 1}, "entropy=1 is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        HeadOptions(**options)


def test_options_load_no_torch():
    code = "import sys; from toolkit.head import HeadOptions; HeadOptions(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
