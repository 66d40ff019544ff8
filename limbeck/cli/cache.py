"""``limbeck cache``: store what a teacher says, look at it, check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli.methods import Json
from limbeck.cli.recipes import RecipeName, Set
from limbeck.cli.run import Quiet, checked, interruptible
from limbeck.cli.screen import print_json, print_table, say
from limbeck.core.errors import CacheError, ConfigError

app = typer.Typer(
    name="cache",
    help="Store what a teacher says, and learn from it in the teacher's absence.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(help="A cache's folder.", metavar="CACHE")]


@app.command()
def build(
    recipe: RecipeName,
    settings: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the cache.", show_default="the recipe's teacher.cache")
    ] = None,
    views: Annotated[
        int | None, typer.Option(min=1, help="Views of each sample.", show_default="the recipe's data.views")
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option(
            help="What to store, and how: logits, 'logits={top_k: {k: 20}}', penultimate. May come several times.",
            metavar="TAP[=CODEC]",
            show_default="what the loss asks its teacher, in half precision",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples the teacher sees at once.")] = 128,
    part: Annotated[
        str | None,
        typer.Option(help="Build every n-th shard only, from the i-th on; merge puts parts together.", metavar="I/N"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ask a recipe's teacher about all its data, once. Goes on where it was stopped; several may build at once."""
    from limbeck.engine.config import TrainConfig
    from limbeck.engine.progress import Bar
    from limbeck.recipes.caching import build_cache
    from limbeck.recipes.run import device_of

    read = checked(recipe, [*(settings or ()), "teacher.cache=null"])
    place = out or _named(recipe, settings)
    bar, shown = Bar(quiet), dict[str, Any]()

    def tell(name: str, done: int, total: int) -> None:
        if shown.get("name") != name:
            bar.start(f"{name} views", done, total)
            shown.update(name=name, first=done, began=_now())
        elapsed = _now() - shown["began"]
        bar.update(done, samples_per_s=(done - shown["first"]) / elapsed if elapsed > 0.5 else None)

    try:
        device = device_of(TrainConfig.model_validate({}))
        chosen = {"store": _store(store) if store else None, "views": views, "batch": batch}
        made = interruptible(
            build_cache, read, place, part=_part(part), device=device, progress=tell, quiet=quiet, **chosen
        )
    finally:
        bar.stop()
    if as_json:
        print_json([_facts(cache) for cache in made])
        return
    for cache in made:
        _table(cache)
    say(
        f"{place}: set teacher.cache to it"
        if made
        else f"{place}: this part is done; limbeck cache merge puts parts together"
    )


@app.command()
def info(cache: Folder, as_json: Json = False) -> None:
    """What a cache holds, what it was made from, and what its codecs lost."""
    found = _opened(cache)
    if as_json:
        print_json([_facts(each) for each in found])
        return
    for each in found:
        _table(each)


@app.command()
def verify(
    cache: Folder,
    recipe: Annotated[
        str | None,
        typer.Option(help="Ask this recipe's teacher again about some samples, and compare.", metavar="RECIPE"),
    ] = None,
    settings: Set = None,
    samples: Annotated[int, typer.Option(min=1, help="How many rows are asked again.")] = 64,
    as_json: Json = False,
) -> None:
    """Look at every bit of a cache; with a recipe also at whether its teacher still says so."""
    found = _opened(cache)
    for each in found:
        each.check()
    facts: list[dict[str, Any]] = [
        {"folder": str(each.folder), "rows": each.header.rows, "whole": True} for each in found
    ]
    if recipe is not None:
        from limbeck.recipes.caching import verify_cache

        read = checked(recipe, [*(settings or ()), "teacher.cache=null"])
        for fact, again in zip(facts, verify_cache(read, found, samples), strict=True):
            fact.update(again)
    if as_json:
        print_json(facts)
        return
    for fact in facts:
        asked = f"; {fact['asked']} rows asked again say the same" if "asked" in fact else ""
        say(f"{fact['folder']}: {fact['rows']} rows, every bit as it was written{asked}")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder of the whole cache.", metavar="OUT")],
    parts: Annotated[list[Path], typer.Argument(help="Folders that build left for its parts.", metavar="PART...")],
    as_json: Json = False,
) -> None:
    """Put together what several builders wrote into folders of their own."""
    from limbeck.cache.build import merge as put_together

    names = _inside(parts[0])
    made = [put_together(out / name, [part / name for part in parts]) for name in names]
    if as_json:
        print_json([_facts(each) for each in made])
        return
    for each in made:
        _table(each)


def _now() -> float:
    import time

    return time.monotonic()


def _named(recipe: str, settings: list[str] | None) -> Path:
    from limbeck.recipes.load import read

    teacher = read(recipe, settings or ()).data.get("teacher")
    place = teacher.get("cache") if isinstance(teacher, dict) else None
    if not isinstance(place, str):
        raise ConfigError("no folder for the cache", where="teacher.cache", remedy="name one there, or give --out")
    return Path(place)


def _store(texts: list[str]) -> dict[str, Any]:
    from limbeck.recipes.document import parse_value

    found = {}
    for text in texts:
        tap, equals, codec = (part.strip() for part in text.partition("="))
        found[tap] = parse_value(codec, "--store") if equals else None
    return found


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise ConfigError(
            "cannot be read", where="--part", found=text, wanted="I/N with I from 0 to N - 1, such as 0/2"
        )
    return int(first), int(count)


def _inside(folder: Path) -> list[str]:
    """The caches in a folder: of the training data, and of those held out; or the folder itself."""
    if (folder / "header.json").is_file():
        return [""]
    found = [name for name in ("train", "validation", "test") if (folder / name / "header.json").is_file()]
    if not found:
        raise CacheError("there is no cache", where=str(folder), remedy="limbeck cache build makes one")
    return found


def _opened(folder: Path) -> list[Any]:
    from limbeck.cache.folder import Cache

    return [Cache(folder / name) for name in _inside(folder)]


def _facts(cache: Any) -> dict[str, Any]:
    return {
        "folder": str(cache.folder),
        **cache.header.written(),
        "shards": cache.header.shards,
        "rows": cache.header.rows,
        "bytes": cache.bytes,
        "bytes_a_row": cache.bytes / cache.header.rows,
        "errors": cache.errors,
    }


def _table(cache: Any) -> None:
    header = cache.header
    rows = [
        ("samples", f"{header.samples:,}"),
        ("views", header.views),
        ("teacher", f"{header.teacher.get('class', '?')}, {header.teacher.get('parameters', 0):,} parameters"),
        ("augmentation", header.data["augment"] or "none"),
        ("size", f"{cache.bytes:,} bytes in {header.shards} shards, {cache.bytes / header.rows:.1f} a row"),
    ]
    for signal in header.signals:
        lost = "; ".join(
            f"{measure} {values['mean']:.3g} on average, {values['max']:.3g} at most"
            for measure, values in cache.errors.get(signal.name, {}).items()
        )
        rows.append((signal.name, f"{signal.codec.written()}, lost: {lost or 'nothing'}"))
    rows += [(name, "the same for all samples") for name in header.constants]
    print_table((str(cache.folder), ""), rows)
