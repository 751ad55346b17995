"""Train a pipeline of stages, evaluate it, write its report.

python train.py                                      the embedded run: minutes on two CPU cores, no download
python train.py resampler=perceiver                  swap one part of the model
python train.py stages.dense.image_size=64           change a setting of one stage
python train.py -m seed=0,1,2                        a sweep
python train.py -m experiment=llava_align            a study: its whole grid, then table, plots and verdicts
python train.py --cfg job                            print every setting
"""

from fastvlm.config import command


def train(config):
    from fastvlm.study.cell import finished_cell, objective

    if config.dry_run:
        from fastvlm.study.dry_run import dry_run

        return dry_run(config)
    results = finished_cell(config)
    if results is None:
        from fastvlm.pipeline import Pipeline

        results = Pipeline(config).run()
    return objective(results, names=list(config.objective))


if __name__ == "__main__":
    command("train", train)
