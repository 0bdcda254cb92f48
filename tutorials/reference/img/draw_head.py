"""Draw head.png from the table of ../head.md: time and peak memory of each variant."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SHORT = {"toolkit, gspo, one long sequence, one chunk retained": "toolkit, gspo, long sequence, retained"}


def rows() -> list[tuple[str, float, float]]:
    """Return name, time over the floor, and peak in MiB of each row of the table."""
    table = (HERE.parent / "head.md").read_text().partition("<!-- table: bench=bars -->\n")[2].partition("\n\n")[0]
    cells = [[cell.strip().replace(",", "") for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    names = [line.strip("| ").split(" | ")[0] for line in table.splitlines()[2:]]
    return [(name, float(row[3]), float(row[4])) for name, row in zip(names, cells, strict=True)]


def main() -> None:
    """Write head.png beside this file."""
    shown = rows()[::-1]
    names = [SHORT.get(name, name) for name, _, _ in shown]
    colours = ["#2c7fb8" if name.startswith("toolkit") else "#b0b0b0" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(11, 6), sharey=True, layout="constrained")
    titles = ("CPU time over the bare matrix products", "peak memory over the inputs, MiB")
    for column, (axis, title) in enumerate(zip(axes, titles, strict=True), start=1):
        values = [row[column] for row in shown]
        bars = axis.barh(names, values, color=colours)
        labels = [f"{value:.2f}" if column == 1 else f"{value:,.0f}" for value in values]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlim(0, max(values) * 1.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    axes[0].axvline(1, color="#c0c0c0", linewidth=0.8, zorder=0)
    figure.savefig(HERE / "head.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
