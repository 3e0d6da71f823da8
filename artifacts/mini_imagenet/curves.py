import json, os
from metalstm import plots
from metalstm.plots.style import new_figure, COLOURS
fig = new_figure((8, 3.6)); axes = fig.subplots(1, 2)
for s, (a, b) in enumerate((("s0","f4"),("s1","g1"),("s2","g2"))):
    for ax, shot in zip(axes, (1, 5)):
        off = 0
        for name, style in ((a, "-"), (b, "--")):
            c = json.load(open(f"HERE/{name}.json"))["curve"]
            x = [(off + r["images"]) / 1e6 for r in c]; y = [r[f"raw{shot}"][0] for r in c]
            ax.plot(x, y, style, color=COLOURS[s], marker=".", label=f"seed {s}" if style == "-" else None)
            off = 1.9008
            off *= 1e6
        ax.set(title=f"{shot}-shot", xlabel="million images of pre-training"); ax.grid(alpha=.3)
axes[0].set_ylabel("validation accuracy, %"); axes[1].legend(); 
fig.tight_layout()
print(plots.save_figure(fig, "HERE/pretraining.png"))
