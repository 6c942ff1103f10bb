"""The options that commands share reach the settings and the images."""

from __future__ import annotations

from pathlib import Path

import bgd_plugin as bgd
from bgd_plugin.cli.arguments import ImageOptions, SettingsOptions
from bgd_plugin.cli.images import preprocessing
from bgd_plugin.cli.options import Codes, Interpolation, Regime


def test_every_option_of_the_settings_is_passed_on(tmp_path: Path) -> None:
    assert SettingsOptions().settings() == bgd.BGDConfig()
    assert SettingsOptions(regime=Regime.paper_large).settings() == bgd.BGDConfig.paper("large")
    file = tmp_path / "settings.json"
    file.write_text(bgd.BGDConfig(seed=5).to_json())
    assert SettingsOptions(config=file).settings().seed == 5
    found = SettingsOptions(
        override=["fc=float"],
        fc_codebook_size=32,
        pointwise_block_size=8,
        target_size="5kB",
        freeze_norms=True,
        codes=Codes.entropy,
    ).settings()
    assert found.overrides == (("fc", None),) and found.target_bytes == 5000 and found.target_ratio is None
    assert found.linear is not None and found.linear.codebook_size == 32
    assert found.pointwise_conv is not None and found.pointwise_conv.block_size == 8
    assert found.freeze_norms and found.codes == "entropy"
    ratio, bound, fixed = (
        SettingsOptions(**one).settings()
        for one in ({"target_ratio": 7.0}, {"max_divergence": 0.3}, {"fixed_sizes": True})
    )
    assert ratio.target_ratio == 7.0 and bound.max_divergence == 0.3 and fixed.max_divergence is None


def test_every_option_of_the_images_is_passed_on() -> None:
    options = ImageOptions(size=8, resize=9, mean="1,2,3", std="4 5 6", interpolation=Interpolation.bicubic)
    found = preprocessing(options)
    assert (found.size, found.resize, found.mean, found.std) == (8, 9, (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert found.interpolation == "bicubic"
    assert preprocessing(ImageOptions()) == type(found)()  # the defaults of both are ImageNet's
