"""Commands that are written down for people: they name what there is, and a restore can be done by them, in order."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from identity_service.cli import app
from tests.deploy.promises import promise
from tests.deploy.site import ROOT, Site, dig, selects

_SHORT = {"deploy": "Deployment", "deployment": "Deployment", "job": "Job", "svc": "Service", "service": "Service"}
_PROGRAMS = ("identity-service", "/opt/identity-service/bin/identity-service")
_NAMESPACE = ("-n", "identity")


# -- reading ----------------------------------------------------------------------------------------------------------


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in the text's shell blocks, lines that go on put together, comments left out."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"^ *#.*", "", line), comments=True)
            if words:
                yield words


def _written(site: Site) -> Iterator[tuple[str, list[str]]]:
    """Yield (document, words) of each command for a cluster: in a block, or between backticks in the text."""
    pages = {name: text for name, text in site.texts.items() if name.startswith("runbooks/")}
    for name, text in {**pages, "README.md": site.readme, "docs/backup.md": site.backup}.items():
        outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        inline = [shlex.split(found) for found in re.findall(r"`(kubectl [^`]*)`", outside)]
        for words in (*_blocks(text), *inline):
            if words[0] == "kubectl":
                yield name, words


def _unknown(words: list[str]) -> str | None:
    """Return what our own program would not understand of a command line, without its own name."""
    command: Any = typer.main.get_command(app)
    for word in words:
        options = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        if word in (">", "<", "|", "&&"):
            break
        if word.startswith("-") and word != "--help":
            if word.partition("=")[0] not in options:
                return f"{command.name} {word}"
        elif isinstance(command, TyperGroup):
            if word not in command.commands:
                return None if word == "…" else f"{command.name} {word}"
            command = command.commands[word]
    return None


def _value(words: list[str], option: str) -> str | None:
    """Return an option's value, in either spelling."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _labels(words: list[str]) -> dict[str, str] | None:
    selector = _value(words, "-l")
    return None if selector is None else dict(part.split("=", 1) for part in selector.split(","))


# -- every command ----------------------------------------------------------------------------------------------------


@promise
def commands_for_a_cluster_name_what_is_there(site: Site) -> Iterator[str]:
    """Objects of production or its migration, labels that pods have, and folders of this repository."""
    there = {(found["kind"], found["metadata"]["name"]) for found in (*site.production, *site.migrate)}
    for document, words in _written(site):
        for word in words[: words.index("--")] if "--" in words else words:
            kind, slash, name = word.partition("/")
            if slash and kind in _SHORT and "/" not in name and (_SHORT[kind], name) not in there:
                yield f"{document}: {word}"
        folder = _value(words, "-k")
        if folder is not None and not (ROOT / folder / "kustomization.yaml").exists():
            yield f"{document}: -k {folder}"
        labels = _labels(words)
        if labels is not None and not any(selects({"matchLabels": labels}, pod.labels) for pod in site.pods()):
            yield f"{document}: -l {labels}"


commands_for_a_cluster_name_what_is_there.broken_by(
    "a runbook sends to a Deployment that is not there",
    lambda site: site.texts.update(
        {"runbooks/README.md": site.texts["runbooks/README.md"].replace("service-operator", "service-operators")}
    ),
)
commands_for_a_cluster_name_what_is_there.broken_by(
    "the migration of a restore is somewhere else",
    lambda site: _replaced(site, "overlays/production/migrate", "overlays/migrate"),
)


@promise
def commands_in_a_pod_are_those_of_the_program(site: Site) -> Iterator[str]:
    """With options that it has."""
    for document, words in _written(site):
        if "--" in words and (inside := words[words.index("--") + 1 :]) and inside[0] in _PROGRAMS:
            fault = _unknown(inside[1:])
            if fault is not None:
                yield f"{document}: {fault}"


commands_in_a_pod_are_those_of_the_program.broken_by(
    "a restore gives an option of another name", lambda site: _replaced(site, " --trail /tmp", " --export /tmp")
)
commands_in_a_pod_are_those_of_the_program.broken_by(
    "a runbook lists keys by a command of another name",
    lambda site: site.texts.update(
        {"runbooks/README.md": site.texts["runbooks/README.md"].replace("keys list", "keys show")}
    ),
)


# -- a restore --------------------------------------------------------------------------------------------------------


def _on_kubernetes(site: Site) -> list[list[str]]:
    """Return the commands of the page's section about a restore in a cluster, without `kubectl` and the namespace."""
    section = site.backup.partition("\n## On Kubernetes\n")[2].partition("\n## ")[0]
    commands = [words[1:] for words in _blocks(section) if words[0] == "kubectl"]
    return [words[2:] if tuple(words[:2]) == _NAMESPACE else words for words in commands]


def _place(commands: list[list[str]], *start: str, has: str = "") -> int:
    """Return where the command stands that begins with these words, and has one more; -1 where there is none."""
    for place, words in enumerate(commands):
        if tuple(words[: len(start)]) == start and (not has or has in words):
            return place
    return -1


@promise
def a_restore_can_be_done_in_a_cluster(site: Site) -> Iterator[str]:
    """Servers gone, a pod to work in, the database put right in that, servers back, and the pod gone: in this order."""
    commands = _on_kubernetes(site)
    server, operator = "deploy/identity-service", "deploy/identity-service-operator"
    least = dig(site.find("HorizontalPodAutoscaler", "identity-service"), "spec", "minReplicas")
    steps = {
        "the servers are stopped": _place(commands, "scale", server, "--replicas=0"),
        "they are gone": _place(commands, "wait", "--for=delete", "pod"),
        "the pod is asked for": _place(commands, "scale", operator, "--replicas=1"),
        "the pod is there": _place(commands, "rollout", "status", operator),
        "the schema is brought up to date": _place(commands, "wait", "--for=condition=complete"),
        "the pod has the new address": _place(commands, "rollout", "restart", operator),
        "the trail is in the pod": _place(commands, "exec", "-i", operator),
        "the database is put right": _place(commands, "exec", operator, has="after-restore"),
        "the servers are started": _place(commands, "scale", server, f"--replicas={least}"),
        "the pod is gone": _place(commands, "scale", operator, "--replicas=0"),
    }
    for step, place in steps.items():
        if place < 0:
            yield f"nobody sees to it that {step}"
    if list(steps.values()) != sorted(steps.values()):
        yield f"in another order: {steps}"


a_restore_can_be_done_in_a_cluster.broken_by(
    "servers go on while the database is put right",
    lambda site: _replaced(site, "scale deploy/identity-service --replicas=0", "get deploy/identity-service"),
)
a_restore_can_be_done_in_a_cluster.broken_by(
    "the database is put right in a server's pod",
    lambda site: _replaced(
        site,
        "exec deploy/identity-service-operator -- \\\n  identity-service after",
        "exec deploy/identity-service -- \\\n  identity-service after",
    ),
)
a_restore_can_be_done_in_a_cluster.broken_by(
    "one server is back, and the autoscaler has more",
    lambda site: _replaced(site, "identity-service --replicas=3", "identity-service --replicas=1"),
)
a_restore_can_be_done_in_a_cluster.broken_by(
    "the operator's pod is left", lambda site: _replaced(site, "operator --replicas=0", "operator --replicas=1")
)


@promise
def a_restore_waits_for_the_servers_and_nobody_else(site: Site) -> Iterator[str]:
    """For as long as they may take to leave: whoever is still connected is one whom `after-restore` refuses."""
    commands = _on_kubernetes(site)
    words = commands[place] if (place := _place(commands, "wait", "--for=delete", "pod")) >= 0 else []
    selector = {"matchLabels": _labels(words) or {}}
    if not selects(selector, site.pod.labels) or selects(selector, site.operator_pod.labels):
        yield f"waits for {_labels(words)}"
    minutes = re.fullmatch(r"(\d+)m", _value(words, "--timeout") or "")
    if minutes is None or int(minutes[1]) * 60 <= site.pod.spec.get("terminationGracePeriodSeconds", 30):
        yield f"for {_value(words, '--timeout')}"


a_restore_waits_for_the_servers_and_nobody_else.broken_by(
    "a restore waits for all pods of the name",
    lambda site: _replaced(site, ",app.kubernetes.io/component=server\n#", "\n#"),
)
a_restore_waits_for_the_servers_and_nobody_else.broken_by(
    "a restore waits for half of a minute", lambda site: _replaced(site, " --timeout=3m", "")
)


def _replaced(site: Site, old: str, new: str) -> None:
    """Write something else in the page about restoring. Raises ValueError where the old words are not there."""
    if old not in site.backup:
        raise ValueError(f"{old!r} is not written")
    site.backup = site.backup.replace(old, new)
