"""Train a pipeline of stages, evaluate it, write its report.

python train.py                                      the embedded run: minutes on two CPU cores, no download
python train.py resampler=perceiver                  exchange a part
python train.py stages.dense.image_size=64           change a stage
python train.py -m seed=0,1,2                        a sweep
python train.py --cfg job                            everything that can be set
"""

from fastvlm.config import command


def train(config):
    from fastvlm.pipeline import Pipeline

    return Pipeline(config).run()["metrics"].get("test/exact_match/mean")


if __name__ == "__main__":
    command("train", train)
