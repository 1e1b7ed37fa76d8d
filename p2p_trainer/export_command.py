"""`p2p-trainer export`: a saved run in the formats that other servers read."""

import sys

from .saved_run_options import json_object, saved_run_parser


def run(argv: list[str]) -> int:
    """
    Export a saved run.

    Args:
        argv (`list[str]`):
            Arguments, without the command's name.

    Returns:
        `int`: exit code.
    """
    parser = saved_run_parser("export", "Write a saved run in formats that other servers read.", asks=False)
    parser.add_argument(
        "--format", action="append", required=True, choices=("merged", "chat-template", "openai-recipe"),
        help="what to write; may be given more than once, and each then gets a folder of its name",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--tokenizer_only", action="store_true", help="chat-template: leave out the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    arguments = parser.parse_args(argv)
    from .exporting import export_run

    said = export_run(
        arguments.folder,
        arguments.out,
        arguments.format,
        base_model=arguments.base_model,
        tokenizer_only=arguments.tokenizer_only,
        overwrite=arguments.overwrite,
        device=arguments.device or "cpu",
        dtype=arguments.dtype,
        defense=arguments.defense,
        defense_options=json_object(arguments.defense_options, "defense_options"),
    )
    sys.stdout.write("".join(f"{line}\n" for line in [f"{arguments.out}: written.", *said]))
    return 0
