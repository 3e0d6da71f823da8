"""Run the commands of a text file one after the other; resumable.

  python queue.py QUEUE.txt

One command a line (# comments). A line that ended well is written to QUEUE.txt.done;
started again, the queue goes on with the first line that is not there, and the command
goes on from its own checkpoint. The file is read again after every command, so lines
can be added. A command that fails is tried once more, then put in QUEUE.txt.failed.
"""
import datetime, subprocess, sys, time
from pathlib import Path

queue = Path(sys.argv[1])
done, failed = (queue.with_name(queue.name + s) for s in (".done", ".failed"))
log = queue.with_name(queue.name + ".log")


def lines(path):
    if not path.exists():
        return []
    text = [x.strip() for x in path.read_text().splitlines()]
    return [x for x in text if x and not x.startswith("#")]


while True:
    over = set(lines(done)) | set(lines(failed))
    left = [x for x in lines(queue) if x not in over]
    if not left:
        if "--wait" not in sys.argv:
            break
        time.sleep(5)
        continue
    for attempt in (1, 2):
        with open(log, "a") as f:
            f.write(f"{datetime.datetime.now():%F %T} start {left[0]}\n")
            f.flush()
            code = subprocess.call(left[0], shell=True, stdout=f, stderr=f)
            f.write(f"{datetime.datetime.now():%F %T} code {code}\n")
        if code == 0:
            break
    with open(done if code == 0 else failed, "a") as f:
        f.write(left[0] + "\n")
