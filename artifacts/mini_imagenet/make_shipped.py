"""All six files, with their results, into the package; their episodes into docs."""
import json, os, shutil, subprocess, sys
from pathlib import Path
lib = Path(sys.argv[1])
pairs = {0: ("f4", "nH1", "nH5"), 1: ("g1", "nH1s1", "nH5s1"), 2: ("g2", "nH1s2", "nH5s2")}
env = os.environ | {"PYTHONPATH": f"{lib}:HERE"}
for seed, (theta, *rules) in pairs.items():
    for shot, rule in zip((1, 5), rules):
        name = f"mini-imagenet-{shot}shot-{seed}"
        ev = Path("final") / name / f"evaluation-5w{shot}s-0.json"
        if not ev.exists():
            print("missing", name); continue
        (row,) = json.loads(ev.read_text())
        log = json.loads(Path(rule + ".json").read_text())
        info = {
            "trained_on": "mini-ImageNet, the 64 training classes of Ravi & Larochelle's split, 84x84 pixels divided by 255",
            "result": f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}% in 5-way {shot}-shot, {row['episodes']:,} test episodes, inductive",
            "limits": f"natural images of 84x84 pixels; five updates on {shot} image{'s' if shot > 1 else ''} of each class; theta_0 is pre-trained, its gates meta-trained on 16 classes that another theta_0 had not seen",
            "meta_training": {"episodes": 1000 if shot == 1 else 600, "wall_seconds": round(log.get("seconds", 0))},
        }
        out = lib / "metalstm" / "shipped" / f"{name}.npz"
        out.parent.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "ship.py", "--theta", theta, "--rule", rule, "--shot", str(shot), "--seed", str(seed), "--out", str(out), "--info", json.dumps(info)], check=True, env=env)
        shutil.copy(ev.with_suffix(".npz"), lib / "docs/results/mini_imagenet" / f"{name}.npz")
        print(name, info["result"], out.stat().st_size)
