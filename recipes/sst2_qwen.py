"""
Defended fine-tuning on SST-2, the main job of the P2P paper.

    accelerate launch recipes/sst2_qwen.py
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/sst2_qwen.py \
        --model_name_or_path MODEL_FOLDER --dataset_name DATA_FOLDER

Settings stand in `sst2_qwen.yaml`; `--config FILE` names another file, and flags override either.
"""

from pathlib import Path

from p2p_trainer.launch import main


if __name__ == "__main__":
    main(default_config=Path(__file__).with_suffix(".yaml"))
