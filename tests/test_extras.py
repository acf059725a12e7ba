"""What needs an extra says so, and how to get it."""

import builtins

import pytest

from edt_former.extras import need


@pytest.fixture
def without(monkeypatch):
    """Hides a package."""

    def hide(*names: str) -> None:
        real = builtins.__import__

        def fake(name, *args, **kwargs):
            if name.partition(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)
        import importlib

        find = importlib.import_module

        def hidden(name, *args):
            if name.partition(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
            return find(name, *args)

        monkeypatch.setattr("edt_former.extras.import_module", hidden)

    return hide


def test_the_extra_is_named(without, tmp_path, caption_file):
    from edt_former.data import prepare

    without("pyarrow", "yaml", "nltk", "peft")
    with pytest.raises(ImportError, match=r"prepared data needs pyarrow: .*edt-kernels\[train\]"):
        prepare([caption_file], tmp_path)
    with pytest.raises(ImportError, match=r"scores of captions needs nltk: .*edt-kernels\[eval\]"):
        need("nltk.translate", extra="eval", purpose="scores of captions")


def test_an_error_inside_a_package_is_not_its_absence(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'inner'", name="inner")

    monkeypatch.setattr("edt_former.extras.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="inner"):
        need("outer", extra="train", purpose="x")
