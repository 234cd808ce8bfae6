"""python docs/settings.py > docs/settings.md: every setting of every command, source and mechanism."""

from msae.cli.help import markdown_table
from msae.evaluation.job import Evaluate
from msae.explorer.inputs import Explore
from msae.export import Export
from msae.runs.__main__ import Runs
from msae.sae.sparsity import SPARSITIES
from msae.settings import fields_of, keys
from msae.sources.forest import ForestSource
from msae.sources.language_model import LanguageModelSource
from msae.training.settings import Train

PAGE = """# Settings

Every key is declared once, in the dataclass of the code that uses it, with the line that stands here; this page is made
of them (`python docs/settings.py > docs/settings.md`). Give them as `key=value`. Where the default is empty you, or a
file in `conf/`, must give a value. `python -m msae.train --cfg job` shows what files and command line make together."""

SECTIONS: list[tuple[str, type, str]] = [
    ("`python -m msae.train`, `python -m msae.harvest`", Train, ""),
    ("`data.source` of `data=tree`, `+experiment=forest`: a synthetic world", ForestSource, "data.source"),
    ("`data.source` of `data=language_model`", LanguageModelSource, "data.source"),
    *((f"`model.sparsity={{name: {name}, …}}`", cls, "") for name, cls in SPARSITIES.items() if fields_of(cls)),
    ("`python -m msae.evaluate`", Evaluate, ""),
    ("`python -m msae.explore`", Explore, ""),
    ("`python -m msae.export`", Export, ""),
    ("`python -m msae.runs`", Runs, ""),
]

if __name__ == "__main__":
    tables = [f"## {title}\n\n{markdown_table(keys(cls, prefix))}" for title, cls, prefix in SECTIONS]
    print("\n\n".join([PAGE, *tables]))
