import pytest

from effseg.errors import InputError
from effseg.inference import Protocol
from effseg.inference.protocol import scaled, window_starts


@pytest.mark.parametrize("text", ["whole", "size640", "short512", "slide512", "ms+flip", "size1"])
def test_name_round_trips(text):
    assert Protocol.parse(text).name == text
    assert Protocol.parse(Protocol.parse(text).name) == Protocol.parse(text)


def test_default_is_whole():
    assert Protocol() == Protocol.parse("whole")


@pytest.mark.parametrize(
    "text",
    ["", "Whole", "size", "size0", "size-3", "size12.5", "size640 ", "slide", "ms", "flip", "640",
     "whole512", "ms+flip512", "size1234567", "size٣"],
)  # fmt: skip
def test_unknown_text_lists_the_forms(text):
    with pytest.raises(InputError, match=r"sizeN .*shortN .*slideN .*ms\+flip") as caught:
        Protocol.parse(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [("size",), ("slide", 0), ("whole", 512), ("ms+flip", 2)])
def test_constructor_refuses_what_parse_refuses(arguments):
    with pytest.raises(InputError, match="protocol"):
        Protocol(*arguments)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        ("whole", (375, 500), (375, 500)),
        ("size640", (375, 500), (480, 640)),
        ("size640", (500, 375), (640, 480)),
        ("size256", (333, 500), (170, 256)),  # 170.496
        ("short512", (375, 500), (512, 683)),  # 682.67
        ("short512", (500, 375), (683, 512)),
        ("size64", (1, 1000), (1, 64)),  # never 0
    ],
)
def test_target_keeps_the_ratio(text, size, expected):
    assert Protocol.parse(text).target(*size) == expected


def test_scaled_rounds_halves_up():
    assert scaled(5, 7, 0.5) == (3, 4)
    assert scaled(1, 1, 0.1) == (1, 1)


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [(512, 512, [0]), (300, 512, [0]), (513, 512, [0, 1]), (853, 512, [0, 341]),
     (1000, 512, [0, 244, 488]), (10, 3, [0, 1, 3, 5, 7]), (3, 1, [0, 1, 2])],
)  # fmt: skip
def test_windows(length, size, expected):
    assert window_starts(length, size) == expected


def test_windows_cover_every_pixel():
    for length in range(1, 90):
        for size in (1, 2, 7, 32):
            starts = window_starts(length, size)
            assert len(set(starts)) == len(starts)
            covered = {x for s in starts for x in range(s, s + size)}
            assert covered >= set(range(length))
            assert max(covered) < max(length, size)
