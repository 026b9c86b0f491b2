"""The networks that tags in prompts name, `<lora:NAME:STRENGTH>`: found and checked once, while a run is planned."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.errors import InputError
from library.files.model_files import ModelFiles
from networks.files import OWN_MODULE, FileCheck, NetworkPlan, NetworkSpec, check_strength, open_network
from networks.folder import NetworkFolder
from networks.strengths import OFF, Strength

Tag = tuple[str, Strength]  # the name that stands in it, and the strength


@dataclass(frozen=True, slots=True)
class TagUse:
    """A tag's network in one picture.

    Args:
        place: among the networks of all the run's tags.
        file: its weights.
        strength: how strongly it acts.
    """

    place: int
    file: Path
    strength: Strength


class TaggedNetworks:
    """The networks of a run's tags, in the order in which pictures first use them.

    Args:
        folder: `--network_dir`, None where it is not given.
        model: what the networks are checked against.
    """

    def __init__(self, folder: str | None, model: ModelFiles) -> None:
        self._folder = None if folder is None else NetworkFolder(Path(folder))
        self._model = model
        self._check = FileCheck(model)
        self._known: dict[str, NetworkSpec] = {}  # by name in tags
        self._used: dict[Path, NetworkSpec] = {}
        self._places: dict[Path, int] = {}
        self._closed = False

    def use(self, tags: Sequence[Tag], where: str) -> tuple[TagUse, ...]:
        """What a picture's tags come to. Networks that act nowhere in it are checked, and left out.

        Args:
            tags: of its prompt, from `strengths.parse_tag`.
            where: its place, for messages.

        Raises:
            InputError: for a network that is not there or does not fit the model, and one that two tags name.
        """
        uses: dict[Path, TagUse] = {}
        named: dict[Path, str] = {}
        for name, strength in tags:
            subject = f"<lora:{name}:{strength}>"
            spec = self._spec(name, subject, where)
            file = spec.weights.path
            if file in named:
                problem = "names" if named[file] == name else f"is the network {named[file]},"
                raise InputError(subject, f"{problem} a second time in one prompt; keep one of the tags", where)
            named[file] = name
            check_strength(spec, strength, self._model, subject, where)
            if strength.acts:
                uses[file] = TagUse(self._place(spec, subject, where), file, strength)
        return tuple(sorted(uses.values(), key=lambda use: use.place))

    def added_to(self, networks: NetworkPlan) -> NetworkPlan:
        """The plan of the networks that options name, with all that have been used so far; no more can be from now on,
        since the plan's are loaded.
        """
        self._closed = True
        specs = tuple(self._used.values())
        return replace(networks, specs=networks.specs + specs, tagged=len(specs))

    @property
    def files(self) -> list[Path]:
        """The files of the networks used so far."""
        return list(self._used)

    def _spec(self, name: str, subject: str, where: str) -> NetworkSpec:
        if name not in self._known:
            if self._folder is None:
                problem = "names a network in a folder; give that with --network_dir, or leave the tag out"
                raise InputError(subject, problem, where)
            path = self._folder.find(name, subject, where)
            spec = NetworkSpec(OWN_MODULE, open_network(path), OFF, {})
            self._check(spec, f"{subject}, {spec.weights.path}", where)
            self._known[name] = spec
        return self._known[name]

    def _place(self, spec: NetworkSpec, subject: str, where: str) -> int:
        file = spec.weights.path
        if file not in self._places:
            if self._closed:
                problem = (
                    "no tags with --interactive, which loads networks at its start; name it there, and set it by --am"
                )
                raise InputError(subject, problem, where)
            self._places[file] = len(self._used)
            self._used[file] = spec
        return self._places[file]
