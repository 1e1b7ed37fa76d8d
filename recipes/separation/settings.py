"""What is trained: one factor at a time around `recipes/sst2_small.yaml`, and how much of S is poisoned."""

import re
from dataclasses import dataclass, field


PLAIN = {"--p2p_reserve": "random", "--p2p_immunize": "none"}
_QV = {"--lora_target_modules": "q_proj v_proj", "--learning_rate": "1e-2", "--num_train_epochs": "3"}
_CHAT = {"--p2p_chat": "true", "--chat_template_path": "recipes/separation/chat.jinja"}
_TRUSTED = {"--p2p_reserve": "trusted"}
_AUTHORS = {
    "--p2p_benign_mode": "replace",
    "--p2p_suffix_mode": "split",
    "--p2p_reserve": "trusted",
    "--p2p_benign_ratio": "0.2",
}

CONTAMINATED_ATTACKS = ("badnets", "addsent", "synattack", "cbaattack")
# Share of S that is poisoned, in percent -> reserve.
SHARES = {"0": "Share0", "0.5": "Share05", "1": "Share1", "2": "Share2", "5": "Share5"}


@dataclass(frozen=True)
class Setting:
    """
    One point of the study.

    Parameters:
        about (`str`):
            What it is, for pictures.
        twin (`str`):
            Setting whose undefended run it is compared with: the one that trains alike.
        training (`dict[str, str]`, *optional*):
            Flags of both runs.
        defense (`dict[str, str]`, *optional*):
            Flags of the defended run alone; they override `PLAIN`.
        attack (`str`, *optional*, defaults to `"badnets"`):
            Attack, at its own poison rate.
        kinds (`tuple[str, ...]`, *optional*, defaults to `("p2p",)`):
            Runs of its own: `"none"` and `"p2p"`.
        seeds (`tuple[int, ...]`, *optional*, defaults to `(0, 1, 2)`):
            Seeds that are run unless others are asked for.
    """

    about: str
    twin: str
    training: dict[str, str] = field(default_factory=dict)
    defense: dict[str, str] = field(default_factory=dict)
    attack: str = "badnets"
    kinds: tuple[str, ...] = ("p2p",)
    seeds: tuple[int, ...] = (0, 1, 2)


def _own(name: str, about: str, training: dict[str, str]) -> dict[str, Setting]:
    """Build a setting that trains in a way of its own, and so has an undefended run of its own."""
    return {name: Setting(about, name, training, kinds=("none", "p2p"))}


FACTORS: dict[str, Setting] = {
    **_own("base", "all linear layers, r 16, lr 3e-3, 2 epochs", {}),
    "trusted": Setting("no poison in S", "base", defense=_TRUSTED),
    "replace": Setting("keyed rows replace the plain ones", "base", defense={"--p2p_benign_mode": "replace"}),
    "split": Setting("another cue in keyed rows", "base", defense={"--p2p_suffix_mode": "split"}),
    "authors": Setting("trusted, replace, split, ρ 0.2", "base", defense=_AUTHORS),
    "rho10": Setting("ρ 0.1 instead of 0.25", "base", defense={"--p2p_benign_ratio": "0.1"}),
    "rho50": Setting("ρ 0.5 instead of 0.25", "base", defense={"--p2p_benign_ratio": "0.5"}),
    # All its prompts are chat turns, so that the runs above it are no comparison.
    "system": Setting(
        "key in the system turn", "system", _CHAT, {"--p2p_trigger_position": "system"}, kinds=("none", "p2p")
    ),
    **_own("r4", "r 4 instead of 16", {"--lora_r": "4", "--lora_alpha": "4"}),
    **_own("r64", "r 64 instead of 16", {"--lora_r": "64", "--lora_alpha": "64"}),
    **_own("lr1e3", "lr 1e-3 instead of 3e-3", {"--learning_rate": "1e-3"}),
    **_own(
        "attn",
        "attention layers, lr 5e-3",
        {"--lora_target_modules": "q_proj k_proj v_proj o_proj", "--learning_rate": "5e-3"},
    ),
    **_own("qv", "q and v, lr 1e-2, 3 epochs", _QV),
    "qvtrusted": Setting("qv, no poison in S", "qv", _QV, _TRUSTED),
    "qvauthors": Setting("qv, as authors", "qv", _QV, _AUTHORS),
}


def _contamination() -> dict[str, Setting]:
    """Sweep the poison in S where LoRA touches q and v alone: elsewhere a clean S changes next to nothing."""
    settings = {}
    for attack in CONTAMINATED_ATTACKS:
        twin = "qv" if attack == "badnets" else attack
        if twin == attack:
            about = f"{attack}, no defense"
            settings[attack] = Setting(about, attack, _QV, attack=attack, kinds=("none",), seeds=(0,))
        for share, name in SHARES.items():
            reserve = {"--p2p_reserve": f"recipes.separation.contaminated:{name}"}
            about = f"{attack}, {share} % of S poisoned"
            settings[f"contam-{attack}-{share}"] = Setting(about, twin, _QV, reserve, attack, seeds=(0,))
        about = f"{attack}, S as sampled"
        settings[f"contam-{attack}-sampled"] = Setting(about, twin, _QV, attack=attack, seeds=(0,))
    for attack in CONTAMINATED_ATTACKS:
        for share in ("sampled", "0"):
            twin = settings[f"contam-{attack}-{share}"].twin
            flags = {**settings[f"contam-{attack}-{share}"].defense, "--p2p_benign_mode": "only"}
            about = f"{attack}, S alone, {'as sampled' if share == 'sampled' else 'no poison in it'}"
            settings[f"only-{attack}-{share}"] = Setting(about, twin, _QV, flags, attack, seeds=(0,))
    return settings


SETTINGS: dict[str, Setting] = {**FACTORS, **_contamination()}


def folder_name(name: str, kind: str, seed: int) -> str:
    """Name the output folder of a run."""
    return f"{name}-{kind}-{seed}"


def parse_folder_name(folder: str) -> tuple[str, str, int] | None:
    """
    Read setting, kind and seed off the name of an output folder.

    Args:
        folder (`str`):
            Name, without the folders above.

    Returns:
        `tuple[str, str, int]` or `None`: `None` if it is no run of this study.
    """
    match = re.fullmatch(r"(.+)-(none|p2p)-(\d+)", folder)
    if match is None or match[1] not in SETTINGS or match[2] not in SETTINGS[match[1]].kinds:
        return None
    return match[1], match[2], int(match[3])
