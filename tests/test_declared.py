"""What scheduler configs declare, against diffusers' own classes."""

import ast
import inspect
import math
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from zsnr.interop.declared import (
    SCHEDULERS,
    declare,
    diffusers_timesteps,
    first_timestep,
    off_grid_steps,
)
from zsnr.schedule import MAX_TIMESTEPS

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KEYS = {key for cls in SCHEDULERS.values() for key in cls.defaults}
STEPS = [
    *range(1, 13),
    20,
    25,
    29,
    30,
    47,
    48,
    49,
    50,
    51,
    61,
    64,
    75,
    100,
    103,
    121,
    150,
    199,
    250,
    333,
    500,
    501,
    667,
    999,
    1000,
]


@pytest.fixture(scope="module")
def theirs():
    """Classes of diffusers by name; the one that needs torchsde with a stand-in for it."""
    import diffusers

    found = {n: getattr(diffusers, n) for n in SCHEDULERS if n != "DPMSolverSDEScheduler"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
    return {**found, "DPMSolverSDEScheduler": DPMSolverSDEScheduler}


def make(cls, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_config(config)


@pytest.mark.peer
@pytest.mark.parametrize("name", SCHEDULERS)
def test_defaults_are_diffusers(theirs, name):
    parameters = inspect.signature(theirs[name].__init__).parameters
    known = {key: parameters[key].default for key in KEYS if key in parameters}
    assert known == dict(SCHEDULERS[name].defaults)


@pytest.mark.peer
def test_no_class_is_forgotten():
    """Classes that take beta_schedule and prediction_type and sample forward are in the table."""
    import diffusers.schedulers

    others = {
        "DDIMInverseScheduler",
        "DPMSolverMultistepInverseScheduler",
        "UnCLIPScheduler",
    }
    found = set()
    for path in Path(diffusers.schedulers.__file__).parent.glob("scheduling_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Scheduler"):
                init = next(f for f in node.body if getattr(f, "name", "") == "__init__")
                if {"beta_schedule", "prediction_type"} <= {a.arg for a in init.args.args}:
                    found.add(node.name)
    assert found == set(SCHEDULERS) | others


@pytest.mark.peer
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        SD,
        {**SD, "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2, 0.5, 1.0], "num_train_timesteps": 4},
    ],
)
def test_schedules_are_diffusers(theirs, name, config):
    if config.get("trained_betas") and name in ("LCMScheduler", "TCDScheduler"):
        config = {**config, "original_inference_steps": 4}
    declared = declare({"_class_name": name, **config})
    abar = make(theirs[name], **config).alphas_cumprod.double()
    ours = declared.schedule.alphas_cumprod.clone()
    if declared.patched:
        assert ours[-1] == 0
        ours[-1] = 2**-24
    torch.testing.assert_close(ours, abar, rtol=3e-4, atol=1e-6)
    assert (abar[-1] == ours[-1]) == (ours[-1] in (0, 2**-24))
    assert declared.drops_rescale == (
        "rescale_betas_zero_snr" in config and not SCHEDULERS[name].rescales
    )


@pytest.mark.peer
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_grids_are_diffusers(theirs, name, spacing):
    config = {**SD, "timestep_spacing": spacing, "steps_offset": 1, "skip_prk_steps": True}
    scheduler = make(theirs[name], **config)
    declared = declare({"_class_name": name, **config})
    twice = name.startswith(("Heun", "KDPM2")) or name == "DPMSolverSDEScheduler"
    for steps in STEPS:
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError):
            with pytest.raises(ValueError, match="num_steps"):
                diffusers_timesteps(declared, steps)
            continue
        real = scheduler.timesteps.tolist()
        real = real[::2] if twice else real
        if name == "PNDMScheduler" and steps > 1:
            del real[1]
        assert list(diffusers_timesteps(declared, steps)) == real, steps
        assert first_timestep(declared, steps) == real[0]


@pytest.mark.peer
def test_every_step_count_of_ddim(theirs):
    for spacing in ("leading", "linspace", "trailing"):
        config = {"timestep_spacing": spacing}
        scheduler, declared = make(theirs["DDIMScheduler"], **config), declare(config)
        longer = []
        for steps in range(1, 1001):
            scheduler.set_timesteps(steps)
            grid = diffusers_timesteps(declared, steps)
            assert list(grid) == scheduler.timesteps.tolist()
            if len(grid) != steps:
                assert grid[-1] == -1
                longer.append(steps)
        assert len(longer) == (62 if spacing == "trailing" else 0)


@pytest.mark.peer
def test_runge_kutta_steps_start_where_the_grid_does(theirs):
    scheduler = make(theirs["PNDMScheduler"], **SD)
    declared = declare({"_class_name": "PNDMScheduler", **SD})
    for steps in (4, 10, 25, 50):
        scheduler.set_timesteps(steps)
        assert first_timestep(declared, steps) == scheduler.timesteps[0]
        assert {*diffusers_timesteps(declared, steps)} <= {*scheduler.timesteps.tolist()}
    with pytest.raises(ValueError, match="supports 4 to 1000"):
        first_timestep(declared, 3)


@pytest.mark.peer
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("warp", ["use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas"])
def test_grids_of_noise_levels_start_where_diffusers_does(theirs, name, warp):
    if warp not in SCHEDULERS[name].defaults:
        return
    for spacing in ("leading", "trailing"):
        config = {**SD, warp: True, "timestep_spacing": spacing}
        declared = declare({"_class_name": name, **config})
        scheduler = make(theirs[name], **config)
        scheduler.set_timesteps(20)
        # Some cut the timestep of a noise level to an integer: 998.9999 to 998.
        assert math.isclose(first_timestep(declared, 20), scheduler.timesteps[0], abs_tol=1)
        with pytest.raises(ValueError, match="noise levels"):
            diffusers_timesteps(declared, 20)


@pytest.mark.peer
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_clipped_noise_levels_are_left_out(theirs, spacing):
    for name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        for rescale in (False, True):
            config = {
                "beta_schedule": "squaredcos_cap_v2",
                "lambda_min_clipped": -5.1,
                "timestep_spacing": spacing,
                "rescale_betas_zero_snr": rescale,
            }
            scheduler = make(theirs[name], **config)
            declared = declare({"_class_name": name, **config})
            for steps in (1, 5, 20, 50):
                scheduler.set_timesteps(steps)
                wanted = scheduler.timesteps.tolist()
                assert list(diffusers_timesteps(declared, steps)) == wanted


@pytest.mark.peer
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_off_grid_steps_are_those_that_diffusers_takes(theirs, name, spacing):
    """A step with x_0 = 0 and eps = 1 tells its neighbour: x_s = sigma_s."""
    config = {**SD, "timestep_spacing": spacing, "skip_prk_steps": True, "clip_sample": False}
    declared = declare({"_class_name": name, **config})
    if name != "DDIMScheduler":
        expected = name == "PNDMScheduler"
        assert declared.scheduler.recomputes_next == expected
        assert (off_grid_steps(declared, 48) > 0) == (expected and spacing != "leading")
        return
    scheduler = make(theirs[name], **config)
    sigma = (1 - scheduler.alphas_cumprod).sqrt()
    for steps in (1, 5, 10, 30, 48, 50):
        scheduler.set_timesteps(steps)
        grid, off = scheduler.timesteps.tolist(), 0
        for t, s in zip(grid, [*grid[1:], -1], strict=True):
            one = torch.ones(1)
            x_s = scheduler.step(one, t, sigma[t] * one).prev_sample
            off += not math.isclose(float(x_s), float(sigma[s]) if s >= 0 else 0, abs_tol=1e-6)
        assert off_grid_steps(declared, steps) == off


@pytest.mark.peer
@pytest.mark.parametrize("name", SCHEDULERS)
def test_which_classes_survive_zero_snr(theirs, name):
    if name == "DPMSolverSDEScheduler":
        return  # its noise needs torchsde
    betas = torch.linspace(0.01, 0.1, 100).tolist()
    betas[-1] = 1.0
    config = {
        "trained_betas": betas,
        "num_train_timesteps": 100,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "skip_prk_steps": True,
        "clip_sample": False,
        "original_inference_steps": 50,
    }
    scheduler = make(theirs[name], **config)
    x, finite = torch.ones(1, 1, 2, 2), True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(10)
            x = x * scheduler.init_noise_sigma
            for t in scheduler.timesteps[:3]:
                scaled = scheduler.scale_model_input(x, t)
                arguments = (t, x)
                if name == "CogVideoXDPMScheduler":  # it takes its history as arguments
                    arguments = (None, t, None, x)
                x = scheduler.step(torch.zeros_like(x), *arguments, return_dict=False)[0]
                finite = finite and bool(x.isfinite().all() and scaled.isfinite().all())
    except (IndexError, RuntimeError, ValueError, TypeError) as error:
        pytest.fail(f"{name}: {error}")
    assert SCHEDULERS[name].finite_at_zero == finite


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no schedule of betas"),
        ({"_class_name": "MyScheduler"}, "Known: DDIMScheduler"),
        ({"_class_name": ["DDIMScheduler"]}, "a list is unknown"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "rectified flow"),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_type": "continuous",
                "prediction_type": "v_prediction",
            },
            "no schedule of betas",
        ),
        ({"prediction_type": "v"}, "Known: 'epsilon'"),
        ({"prediction_type": None}, "prediction_type=None"),
        ({"prediction_type": {}}, "prediction_type=a dict"),
        ({"timestep_spacing": "karras"}, "Known: 'leading'"),
        ({"timestep_spacing": ["leading"]}, "timestep_spacing=a list"),
        ({"beta_schedule": "sigmoid"}, "Known: 'linear'"),
        ({"beta_schedule": []}, "beta_schedule=a list"),
        ({"beta_start": "0.1"}, "beta_start='0.1'"),
        ({"beta_start": True}, "beta_start=True"),
        ({"beta_end": math.nan}, "beta_end=nan"),
        ({"beta_end": 10**400}, "beta_end=a huge number"),
        ({"beta_end": 2}, "beta_end=2"),
        ({"rescale_betas_zero_snr": "true"}, "wanted true or false"),
        ({"rescale_betas_zero_snr": 1}, "wanted true or false"),
        ({"num_train_timesteps": 1e3}, "wanted a whole number"),
        ({"num_train_timesteps": 10**9}, f"wanted 2 to {MAX_TIMESTEPS}"),
        ({"num_train_timesteps": 0}, "wanted 2 to"),
        ({"steps_offset": -1}, "wanted 0 to"),
        ({"trained_betas": "0.1"}, "wanted a list of numbers"),
        ({"trained_betas": [0.1, None]}, "wanted a list of numbers"),
        ({"trained_betas": [0.1, [0.2]]}, "wanted a list of numbers"),
        ({"trained_betas": [0.1, 1.5]}, r"outside of \(0, 1\]"),
        ({"trained_betas": [0.1, math.nan]}, r"outside of \(0, 1\]"),
        ({"trained_betas": []}, "wanted a list of numbers"),
        ({"trained_betas": [0.1] * 1_000_000}, "1000000 entries"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 2000}, "wanted 1 to 1000"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": "x"}, "wanted a num"),
    ],
)
def test_wrong_values_are_named(config, words):
    with pytest.raises(ValueError, match=words):
        declare(config)


def test_missing_keys_are_listed():
    declared = declare({"_class_name": "PNDMScheduler", "steps_offset": 1, "clip_sample": True})
    assert "timestep_spacing" in declared.missing
    assert not {"steps_offset", "_class_name"} & {*declared.missing}
    assert "_class_name" in declare({}).missing
    assert declared.clip_sample is None
    assert declare({}).clip_sample is True


@pytest.mark.peer
def test_eta_of_one_fails_where_it_is_said_to(theirs):
    for name in ("DDIMScheduler", "TCDScheduler"):
        scheduler = make(
            theirs[name],
            **SD,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
            prediction_type="v_prediction",
        )
        failed = False
        for steps in (10, 25, 30, 50):
            scheduler.set_timesteps(steps)
            x = torch.ones(1, 1, 2, 2)
            made = scheduler.step(torch.zeros_like(x), scheduler.timesteps[0], x, eta=1.0)[0]
            failed = failed or bool(made.isnan().any())
        assert SCHEDULERS[name].eta_fails == failed
