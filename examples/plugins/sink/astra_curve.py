"""A sink for astra: the mean reward of every step in RUN_DIR/curve.csv."""


class Curve:
    def __init__(self, run_dir):
        self.file = (run_dir / "curve.csv").open("a", encoding="utf-8")

    def write(self, records):
        for record in records:
            if record.get("process") == "trainer" and "reward_mean" in record:
                print(record["step"], record["reward_mean"], sep=",", file=self.file, flush=True)

    def close(self):
        self.file.close()
