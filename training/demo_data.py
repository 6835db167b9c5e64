"""The demo's data: MovieLens-100K, taken from the installed `recbole` package, in the format of the `data` stage.

Stands before `training.interactions` in `make demo`. RecBole is installed for its example files only (`--no-deps`) and
is never imported. It knows nothing of what the pipeline does with the files.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution
from io import BytesIO
from pathlib import Path

import polars as pl

from training.stage import StageError, write_atomically

SOURCE = "recbole/dataset_example/ml-100k/ml-100k"

LICENSE_NOTE = """\
MovieLens-100K was collected by the GroupLens Research Project at the University of Minnesota and is not under this
project's licence. Under its terms of use you may not use it for commercial or revenue-bearing purposes without first
obtaining permission from GroupLens, may not redistribute it without separate permission, may not state or imply that
the University of Minnesota or GroupLens endorses you, and must acknowledge it in publications:

F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM Transactions on
Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872

The full terms: https://files.grouplens.org/datasets/movielens/ml-100k-README.txt

The files beside this note were written from the copy in the RecBole package: every rating is one interaction,
whatever its value.
"""


def write_movielens(directory: Path) -> None:
    """Write `interactions.csv`, `items.csv` and `LICENSE.txt` into the directory; do nothing where all three are.

    `interactions.csv`, written last, appears only beside a complete `items.csv`. Raises StageError where RecBole's
    example files are not installed.
    """
    if all((directory / name).exists() for name in ("LICENSE.txt", "items.csv", "interactions.csv")):
        return
    items, ratings = _example_table("item"), _example_table("inter")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "LICENSE.txt", LICENSE_NOTE.encode())
    write_atomically(directory / "items.csv", _as_csv(_movies(items)))
    write_atomically(directory / "interactions.csv", _as_csv(ratings.select("user_id", "item_id", "timestamp")))


def _example_table(suffix: str) -> pl.DataFrame:
    """One of RecBole's tab-separated files, all columns as text and named without their `:type`."""
    try:
        path = Path(str(distribution("recbole").locate_file(f"{SOURCE}.{suffix}")))
    except PackageNotFoundError as error:
        raise StageError("MovieLens-100K comes with the package `recbole`, not installed; run `make setup`") from error
    if not path.is_file():
        raise StageError(f"MovieLens-100K is not where `recbole` brings it ({path} is missing); run `make setup`")
    table = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False)
    return table.rename(lambda column: column.split(":")[0])


def _movies(items: pl.DataFrame) -> pl.DataFrame:
    films = [title_and_year(title, year) for title, year in items.select("movie_title", "release_year").iter_rows()]
    genres = pl.col("class").replace("unknown", "").str.replace_all(" ", "|", literal=True)
    return items.select(
        "item_id",
        title=pl.Series([title for title, _ in films]),
        categories=genres,
        release_year=pl.Series([year for _, year in films]),
    )


_YEAR = re.compile(r"\s*\((\d{4})\)$")
_ARTICLES = "The|An|A|La|Le|Les|L'|Il|Lo|El|Los|Las|O|Das|Der|Die|Det|Den"
_TRAILING_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?= *(?:\(|\)|$))")


def title_and_year(title: str, year: str) -> tuple[str, str]:
    """The title as people say it, and the release year or "".

    MovieLens sorts by the first noun ("Usual Suspects, The", also within brackets), RecBole's file leaves one year in
    the title and spells the nameless film "unkonwn".
    """
    in_title = _YEAR.search(title)
    if not re.fullmatch(r"\d{4}", year):
        year = in_title[1] if in_title else ""
    title = _TRAILING_ARTICLE.sub(_article_first, _YEAR.sub("", title))
    return ("unknown" if title == "unkonwn" else title), year


def _article_first(match: re.Match[str]) -> str:
    noun, article = match.groups()
    return f"{article}{noun}" if article.endswith("'") else f"{article} {noun}"


def _as_csv(table: pl.DataFrame) -> bytes:
    content = BytesIO()
    table.write_csv(content)
    return content.getvalue()
