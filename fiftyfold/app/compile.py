"""``fiftyfold compile``: an exported model as machine code for machines like this one."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fiftyfold.modules import compile_model, load


def compile_command(folder: str, output: str) -> None:
    """Compile a compressed model's forward pass to machine code, which takes fewer milliseconds a call.

    The file serves inference on machines whose processor has what this one has, with fiftyfold, its kernels and torch;
    open it by `fiftyfold.load_compiled`. Hand on the folder rather than the file, and load no stranger's.

    Args:
        folder: what `fiftyfold compress`, `fiftyfold export` or fiftyfold.export wrote.
        output: file to write; must end in .pt2 and not exist.
    """
    model = load(folder)
    with Console().status("compiling, which takes half a minute or some"):
        compile_model(model, output)
    size = Path(output).expanduser().stat().st_size
    print(f"{output}: {size:,} bytes, compared with the model; open it by fiftyfold.load_compiled({output!r})")
