"""zsnr doctor on every scheduler class of the installed diffusers, with the class as oracle."""

import json
import math
import random
import sys
import types
import warnings

import pytest
import torch

from zsnr import NoiseSchedule, RectifiedFlow
from zsnr.cli import main
from zsnr.doctor.examine import examine, fix
from zsnr.interop import DiffusersScheduler, process_from_diffusers, schedule_from_diffusers
from zsnr.interop.declared import SCHEDULERS
from zsnr.interop.processes import EXPLODING, FLOWS, declare_flow
from zsnr.metrics.brightness import retained_fraction

OURS = "this package's table"
VERDICTS = {
    **dict.fromkeys(SCHEDULERS, "flawed"),  # by their default betas
    **dict.fromkeys((name for name, cls in FLOWS.items() if cls.flag is None), "fixed"),
    **dict.fromkeys(set(EXPLODING) - {"CosineDPMSolverMultistepScheduler"}, "flawed"),
    "AmusedScheduler": "unknown",
    "BlockRefinementScheduler": "unknown",
    "ConsistencyDecoderScheduler": "unknown",
    "DDIMInverseScheduler": "flawed",
    "DDPMWuerstchenScheduler": "flawed",
    "DPMSolverMultistepInverseScheduler": "flawed",
    "DiscreteDDIMScheduler": "unknown",
    "EntropyBoundScheduler": "unknown",
    "IPNDMScheduler": "fixed",
    "MiniMaxH3Scheduler": "fixed",
    "PiflowScheduler": "fixed",
    "RFD4ProteinaScheduler": "unknown",
    "RePaintScheduler": "flawed",
    "SCMScheduler": "fixed",
    "SchedulerMixin": "unknown",
    "ScoreSdeVpScheduler": "flawed",
    "UnCLIPScheduler": "flawed",
    "VQDiffusionScheduler": "unknown",
}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
CONTINUOUS_V = {
    **SD,
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "timestep_type": "continuous",
    "timestep_spacing": "leading",
    "use_karras_sigmas": True,
}
COGVIDEOX = {
    **SD,
    "_class_name": "CogVideoXDPMScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}


@pytest.fixture
def judged(tmp_path):
    def judge(config):
        path = tmp_path / "scheduler_config.json"
        path.write_text(json.dumps(config))
        found = examine(path)
        json.loads(found.to_json())
        assert "\n" in found.to_text()
        return found

    return judge


def theirs(config):
    """An instance of diffusers' class; the one that needs torchsde with a stand-in for it."""
    import diffusers.schedulers

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = config["_class_name"]
        if name == "DPMSolverSDEScheduler":
            patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
            from diffusers.schedulers import scheduling_dpmsolver_sde as module
        else:
            module = diffusers.schedulers
        return getattr(module, name).from_config(
            {key: v for key, v in config.items() if key != "_class_name"}
        )


def starts(config, steps):
    """The noisiest timestep of each S, by the class itself."""
    scheduler, found = theirs(config), {}
    stage = {"stage_index": 0} if config["_class_name"].startswith("Helios") else {}
    for S in steps:
        scheduler.set_timesteps(S, **stage)
        inverse = "Inverse" in config["_class_name"]
        found[S] = float(scheduler.timesteps.max() if inverse else scheduler.timesteps[0])
    return found


@pytest.mark.peer
def test_every_class_of_diffusers_has_a_verdict():
    from diffusers import schedulers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found = {
        name
        for name in dir(schedulers)
        if isinstance(cls := getattr(schedulers, name), type) and issubclass(cls, SchedulerMixin)
    }
    assert found == {*VERDICTS} - {"DPMSolverSDEScheduler"}  # which needs torchsde


@pytest.mark.parametrize("name", sorted(VERDICTS))
def test_the_verdict_of_every_class_by_its_defaults(judged, name):
    found = judged({"_class_name": name})
    assert (found.verdict, found.facts["scheduler"]) == (VERDICTS[name], name)
    ours = name in SCHEDULERS or name in FLOWS or name in EXPLODING
    assert ours <= (found.facts["judged_by"] == OURS)
    if found.verdict == "unknown":
        assert found.reason.startswith("cannot be told: ")
        return
    said = found.facts["first_timestep"]
    assert said
    assert starts({"_class_name": name}, said) == pytest.approx(said, abs=1e-5)
    assert found.facts["kept_brightness"]["fraction"] == retained_fraction(found.facts["snr_T"], 32)
    assert (found.facts["snr_T"] == 0) == (found.verdict == "fixed")


def test_the_shifted_schedule_of_video_models(judged):
    assert judged(COGVIDEOX).verdict == "fixed"
    found = judged({**COGVIDEOX, "snr_shift_scale": 3.0, "rescale_betas_zero_snr": False})
    assert found.verdict == "flawed"
    assert found.facts["snr_T"] == pytest.approx(0.004682 / 3, abs=1e-6)
    assert "SNR divided by 3" in found.to_text()


def test_flow_is_fixed_with_its_shift_and_its_first_step(judged):
    found = judged(FLOW)
    assert found.verdict == "fixed"
    assert found.reason == ("rectified flow, shift 3: SNR_T = 0, and sampling starts at sigma = 1")
    assert found.facts["schedule"] == RectifiedFlow(3.0).settings()
    assert (found.facts["prediction_type"], found.facts["snr_T"]) == ("flow", 0)
    assert {*found.facts["first_timestep"].values()} == {1000}
    assert "shift to its least sigma twice" in found.warnings[0]
    assert "linspace(1, 1/S, S)" in found.warnings[0]


def test_the_warning_of_the_shift_is_true():
    scheduler = theirs(FLOW)
    scheduler.set_timesteps(10)
    once = 3 / 1000 / (1 + 2 / 1000)
    assert float(scheduler.sigmas[-2]) == pytest.approx(3 * once / (1 + 2 * once))
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    t = torch.arange(999, -1, -100)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), RectifiedFlow(3.0)(t)[1])


def test_continuous_v_is_judged_by_its_noise_levels(judged):
    found = judged(CONTINUOUS_V)
    assert found.verdict == "flawed"
    assert found.facts["snr_T"] == pytest.approx(700**-2)
    assert found.facts["kept_brightness"]["fraction"] == pytest.approx(0.999, abs=5e-4)
    assert found.facts["network_is_told"] == "0.25 log sigma"
    assert starts(CONTINUOUS_V, [10, 50]) == pytest.approx(
        {S: found.facts["first_timestep"][S] for S in (10, 50)}, abs=1e-5
    )
    assert "schedule" not in found.facts
    assert "betas are not used" in found.warnings[0]
    # without a warp, its noise levels are those of the betas
    plain = judged({**CONTINUOUS_V, "use_karras_sigmas": False, "timestep_spacing": "trailing"})
    assert plain.facts["judged_by"].startswith("diffusers ")
    assert plain.facts["snr_T"] == pytest.approx(0.004682, abs=1e-6)
    # epsilon does not know the setting
    assert "schedule" in judged({**CONTINUOUS_V, "prediction_type": "epsilon"}).facts


@pytest.mark.parametrize(
    ("change", "verdict", "words", "first"),
    [
        ({"shift_terminal": 0.1}, "fixed", "sigma = 1", 1000),
        ({"use_karras_sigmas": True}, "fixed", "sigma = 1", 1000),
        ({"use_beta_sigmas": True, "sigma_max": 0.7}, "inconsistent", "sigma = 0.7", 700),
        ({"sigma_max": 0.7}, "fixed", "sigma = 1", 1000),  # used with a warp only
        ({"invert_sigmas": True}, "inconsistent", "reversed time", 0),
        ({"num_train_timesteps": 500}, "fixed", "sigma = 1", 500),
        ({"_class_name": "LTXEulerAncestralRFScheduler"}, "fixed", "shift 3", 1000),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "fixed", "shift 3", 1000),
        ({"_class_name": "HeliosScheduler", "stages": 1}, "fixed", "shift 3", 1000),
        ({"_class_name": "PiflowScheduler"}, "fixed", "SNR = 0 at its first step, flow", 1000),
    ],
)
def test_where_flow_starts(judged, change, verdict, words, first):
    config = {**FLOW, **change}
    found = judged(config)
    assert found.verdict == verdict
    assert words in found.reason
    assert bool(found.changes) == (verdict == "inconsistent")
    said = found.facts["first_timestep"]
    assert {*said.values()} == {first}
    assert starts(config, [10, 50]) == pytest.approx({S: said[S] for S in (10, 50)}, abs=1e-3)


def test_a_shift_by_the_size_of_the_image(judged):
    found = judged({**FLOW, "use_dynamic_shifting": True})
    assert found.verdict == "fixed"
    assert found.facts["shift"] == "by the size of the image, 1.65 to 3.16"
    linear = {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0}
    assert "0.5 to 2" in judged({**FLOW, **linear}).facts["shift"]
    scheduler = theirs({**FLOW, "use_dynamic_shifting": True})
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.15)
    shift = math.exp(1.15)
    assert float(scheduler.sigmas[1]) == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


@pytest.mark.parametrize("name", [name for name, cls in FLOWS.items() if cls.flag is not None])
def test_solvers_with_flow_sigmas(judged, name):
    config = {
        "_class_name": name,
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
    }
    found = judged(config)
    assert (found.verdict, found.facts["shift"]) == ("fixed", 3)
    assert "instead of 1, which keeps" in found.warnings[0]
    scheduler = theirs(config)
    for S in (1, 10, 50):
        scheduler.set_timesteps(S)
        assert found.facts["first_sigma"] == pytest.approx(float(scheduler.sigmas[0]), abs=1e-6)
        assert found.facts["first_timestep"].get(S, 999) == scheduler.timesteps[0]
    assert schedule_from_diffusers(config) == RectifiedFlow(3.0)
    adapter = DiffusersScheduler.from_config(config)
    assert (adapter.schedule, adapter.prediction_type) == (RectifiedFlow(3.0), "flow")
    for wrong in ("epsilon", "v_prediction"):
        assert judged({**config, "prediction_type": wrong}).verdict == "inconsistent"
    warped = judged({**config, "use_karras_sigmas": True})  # up to the noise level of the betas
    assert warped.verdict == "inconsistent"
    assert warped.facts["judged_by"].startswith("diffusers ")


@pytest.mark.parametrize(
    ("config", "verdict", "words"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 20.0}, "flawed", "sigma = 20, SNR_T"),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, "flawed", "sigma = 500"),
        ({"_class_name": "DDIMInverseScheduler", **SD}, "flawed", "0.0682649"),
        (
            {
                "_class_name": "DDIMInverseScheduler",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            },
            "inconsistent",
            "t = 900 for S = 10",
        ),
        ({"_class_name": "IPNDMScheduler", "trained_betas": [0.8, 0.1]}, "flawed", "SNR = 0.562"),
        (
            {
                "_class_name": "RFD4ProteinaScheduler",
                "schedule_mode": "log",
                "noise_mode": "1/t",
                "tsr_k": 1.0,
                "tsr_sigma": 1.0,
            },
            "fixed",
            "starts at sigma = 0.99",
        ),
        ({"_class_name": "RFD4ProteinaScheduler", "tsr_k": 1.0}, "unknown", "needs schedule_mode"),
        ({"_class_name": "NewestScheduler"}, "unknown", "has no scheduler class 'NewestScheduler'"),
        ({"_class_name": "../x"}, "unknown", "has no scheduler class"),
        ({"_class_name": "StableDiffusionPipeline"}, "unknown", "has no scheduler class"),
        ({"_class_name": "UnCLIPScheduler", "num_train_timesteps": 10**8}, "unknown", "too large"),
        ({"_class_name": "UnCLIPScheduler", "variance_type": 3}, "flawed", "keeps signal"),
        ({"_class_name": "RePaintScheduler", "beta_schedule": "x"}, "unknown", "refuses"),
        ({**FLOW, "shift": -1}, "unreadable", "shift=-1: wanted a positive number"),
        ({**FLOW, "shift": "3"}, "unreadable", "wanted a positive number"),
        ({**FLOW, "num_train_timesteps": 1e3}, "unreadable", "wanted a whole number"),
        (
            {**FLOW, "use_karras_sigmas": True, "sigma_max": 80.0},
            "unreadable",
            "sigma_max=80.0: wanted a number of 1 at most",
        ),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 0}, "unreadable", "sigma_max=0"),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 1e300}, "unreadable", "moderate size"),
        ({"_class_name": "IPNDMScheduler", "trained_betas": [2.0, 0.1]}, "unknown", "not a number"),
        ({"_class_name": "IPNDMScheduler", "trained_betas": [0.0, 0.1]}, "unknown", "next to none"),
    ],
)
def test_other_configs(judged, config, verdict, words):
    found = judged(config)
    assert found.verdict == verdict
    assert words in found.reason
    if verdict == "flawed" and "SNR_T = 1 / sigma^2" in found.reason:
        assert "no config setting repairs this" in found.changes[0]


def test_mutated_configs_have_a_verdict(judged):
    draw = random.Random(0)
    wrong = [None, True, 0, -1, 1.5, 10**30, 1e300, math.nan, -math.inf, "", [], [1], {}, "v"]
    good = {
        "_class_name": [*VERDICTS],
        "use_flow_sigmas": [True],
        "use_karras_sigmas": [True],
        "use_dynamic_shifting": [True],
        "invert_sigmas": [True],
        "prediction_type": ["flow_prediction", "v_prediction", "epsilon"],
        "timestep_type": ["continuous"],
        "sigma_max": [0.5, 700.0],
        "num_train_timesteps": [2, 1000],
        **{key: [1.0, 3.0] for key in ("shift", "flow_shift", "snr_shift_scale", "base_shift")},
        "trained_betas": [[0.1, 0.9]],
    }
    for _ in range(300):
        config = {}
        for key in ("_class_name", *draw.sample(list(good), draw.randrange(1, 6))):
            config[key] = draw.choice(good[key])
            if key != "_class_name" and draw.random() < 0.3:
                config[key] = draw.choice(wrong)
        assert judged(config).verdict in (
            "fixed",
            "flawed",
            "inconsistent",
            "unknown",
            "unreadable",
        )


def test_folders_and_fix(tmp_path, capsys):
    (tmp_path / "scheduler").mkdir()
    config = {**FLOW, "_class_name": "EulerDiscreteScheduler"}  # diffusers uses the other class
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert examine(tmp_path).facts["shift"] == 3
    assert main(["doctor", "--fix", str(tmp_path)]) == 0
    assert "Nothing to fix." in capsys.readouterr().err
    index = {"scheduler": ["diffusers", "EDMEulerScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no config setting repairs this"):
        fix(tmp_path)


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        (NoiseSchedule(), "v_prediction"),
        (NoiseSchedule(snr_shift=3.0), "v_prediction"),
        (RectifiedFlow(3.0), "flow"),
        (RectifiedFlow(3.0), "v_prediction"),
    ],
)
def test_a_pipeline_saved_with_zsnrs_scheduler(tmp_path, schedule, prediction_type):
    DiffusersScheduler("heun", schedule, prediction_type).save_pretrained(tmp_path)
    found = examine(tmp_path)
    assert (found.verdict, {*found.facts["first_timestep"].values()}) == ("fixed", {999})
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    read, read_type = process_from_diffusers(config)
    assert read_type == prediction_type
    t = torch.arange(1000)
    torch.testing.assert_close(read(t), schedule(t), rtol=0, atol=2e-6)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**config, "spacing": "leading"}))
    found = examine(tmp_path)
    assert found.verdict == "inconsistent"
    assert found.changes == ('scheduler_config.json: "spacing": "trailing"',)


# Reading


@pytest.mark.parametrize(
    ("config", "schedule", "prediction_type"),
    [
        (FLOW, RectifiedFlow(3.0), "flow"),
        ({**FLOW, "_class_name": "FlowMatchLCMScheduler"}, RectifiedFlow(3.0), "flow"),
        ({**FLOW, "_class_name": "FlowMatchHeunDiscreteScheduler"}, RectifiedFlow(3.0), "flow"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, RectifiedFlow(), "flow"),
        (
            COGVIDEOX,
            NoiseSchedule(beta_start=0.00085, beta_end=0.012),
            "v_prediction",
        ),
        (
            {**COGVIDEOX, "snr_shift_scale": 3.0},
            NoiseSchedule(beta_start=0.00085, beta_end=0.012, snr_shift=3.0),
            "v_prediction",
        ),
        (
            {"_class_name": "CogVideoXDDIMScheduler"},
            NoiseSchedule(
                beta_start=0.00085, beta_end=0.012, snr_shift=3.0, zero_terminal_snr=False
            ),
            "epsilon",
        ),
    ],
)
def test_schedules_are_read(config, schedule, prediction_type):
    assert process_from_diffusers(config) == (schedule, prediction_type)
    assert schedule_from_diffusers(config) == schedule


@pytest.mark.parametrize(
    "config",
    [
        {"trained_betas": [0.1, 0.2, 0.5, 0.9], "num_train_timesteps": 4},
        {"beta_schedule": "squaredcos_cap_v2"},
        SD,
    ],
)
@pytest.mark.parametrize("rescale", [True, False])
def test_shifted_schedules_are_those_of_the_class(config, rescale):
    config = {
        **config,
        "_class_name": "CogVideoXDDIMScheduler",
        "rescale_betas_zero_snr": rescale,
        "snr_shift_scale": 2.5,
    }
    ours = schedule_from_diffusers(config).alphas_cumprod
    torch.testing.assert_close(ours, theirs(config).alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**FLOW, "use_dynamic_shifting": True}, r"1.65 to 3.16.*schedule=.*RectifiedFlow\(shift="),
        ({**FLOW, "num_train_timesteps": 500}, "told 500 u"),
        ({**FLOW, "invert_sigmas": True}, "told reversed times.*schedule="),
        ({"_class_name": "EDMEulerScheduler"}, "up to sigma_max.*schedule=.*prediction_type="),
        (CONTINUOUS_V, "timestep_type='continuous'.*schedule=.*prediction_type="),
        ({"_class_name": "AmusedScheduler"}, "discrete tokens"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "prediction_type='epsilon': wanted 'flow_prediction'",
        ),
        ({"_class_name": "PiflowScheduler"}, "Scheduler class 'PiflowScheduler' is unknown"),
        ({**SD, "prediction_type": "flow"}, "prediction_type='flow' is unknown"),
        ({"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 0}, "snr_shift_scale=0"),
    ],
)
def test_what_has_no_schedule_here_says_the_way_out(config, words):
    with pytest.raises(ValueError, match=words):
        schedule_from_diffusers(config)


def test_missing_keys_of_flow_are_listed():
    assert "shift" in declare_flow({"_class_name": "FlowMapEulerDiscreteScheduler"}).missing
    assert "shift" not in declare_flow(FLOW).missing
