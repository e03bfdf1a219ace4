"""Every shipped recipe is read by the command line, and says what it trains."""

from pathlib import Path

import pytest
import yaml

from effseg import list_models

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_understood(effseg, capsys, path):
    needs = {"folder": ("--data.root=photos", "--data.classes=[background, road]")}
    with pytest.raises(SystemExit) as stop:
        effseg("fit", f"--config={path.stem}", *needs.get(path.stem, ()), "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["model"] in list_models()
    assert config["trainer"]["max_epochs"] > 0
    assert path.read_text().startswith("# "), "a recipe says first what it is for"
