"""FR3E, one step after the other: `python -m fr3e_jax.train --config configs/quickstart.yaml`.

A step samples rounds until enough states carry a gradient, then updates the policy. A round is:

  1. queries            B of them from the stream                       host/data
  2. base trajectories  R whole answers to each; every token's entropy  engine/rollout.first_return
  3. rewards            of the base trajectories                        host/tasks
  4. kept trajectories  one correct, one wrong                          algorithm/explore
  5. positions          the K most uncertain tokens                     algorithm/explore
  6. states             S_0 = the query, S_j = before position T_j      algorithm/explore
  7. partial rollouts   M from each state, on the cached prefixes       engine/rollout.explore
  8. rewards            of the whole answers                            host/tasks
  9. credit             values, modulated advantages, rejection         algorithm/credit
 10. policy update      clip-higher, once enough states are accepted    learner/update

grpo and grpo++ have no positions: their rounds are M rollouts from S_0, which steps 2 and 7 both are.
"""

import dataclasses
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from fr3e_jax.algorithm.credit import accept_states, modulated_advantage
from fr3e_jax.algorithm.explore import keep_trajectories, positions_of, states_of
from fr3e_jax.config import Config, ConfigError, check, dump, fail, find_model, parse, resolve
from fr3e_jax.engine.rollout import Engine
from fr3e_jax.engine.sampler import row_key
from fr3e_jax.host import groups
from fr3e_jax.host.checkpoints import Checkpoints, Progress
from fr3e_jax.host.data import QueryStream, encode_queries
from fr3e_jax.host.export import export_model
from fr3e_jax.host.metrics import Reporter, Stopwatch, read_metrics, write_atomically
from fr3e_jax.host.tasks import Problem, make_task
from fr3e_jax.host.text import load_text
from fr3e_jax.learner.state import TrainState, init_state, make_optimizer, sampling_params
from fr3e_jax.learner.update import Learner
from fr3e_jax.models.hf import CheckpointError, read_config, read_params
from fr3e_jax.models.qwen2 import Params, abstract_params, graph_of, logical_axes
from fr3e_jax.parallel.mesh import SAMPLING_TABLE, Placement, PlacementError, make_mesh, row_parts
from fr3e_jax.types import Queries, Rollouts, StateGroups, States


class SamplingError(RuntimeError):
    """A step did not find enough states that carry a gradient; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What is fixed for a run."""

    config: Config
    source: Path
    placement: Placement
    axes: Params
    engine: Engine
    learner: Learner
    stream: QueryStream
    held_out: list[Problem]
    reference: Params | None

    @property
    def sampling_key(self) -> jax.Array:
        """The key that rollouts derive theirs from."""
        return jax.random.fold_in(jax.random.key(self.config.seed), 0)

    @property
    def choice_key(self) -> jax.Array:
        """The key that random choices of trajectories and positions derive theirs from."""
        return jax.random.fold_in(jax.random.key(self.config.seed), 1)

    def sampling_params(self, params: Params) -> Params:
        """Parameters in the type and layout for sampling."""
        return sampling_params(self.engine.placement, self.axes, params, self.learner.compute_dtype)

    def reward(self, responses: list[np.ndarray], problems: list[Problem]) -> np.ndarray:
        """Verify whole responses (token ids), float32."""
        texts = self.stream.text.decode(responses)
        task = self.stream.task
        return np.array(
            [task.reward(text, problem.answer) for text, problem in zip(texts, problems, strict=True)],
            np.float32,
        )


def setup(config: Config) -> tuple[Run, TrainState]:
    """Check the configuration, then load the model and place it on the mesh."""
    source = find_model(config.model.path)
    architecture = read_config(source)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check(config, row_parts(mesh), architecture.max_position_embeddings)
    graph, axes = graph_of(architecture), logical_axes(architecture)
    placement = Placement(mesh)
    placement.shardings(axes, abstract_params(architecture))
    text = load_text(source, config.data.template)
    task = make_task(config.data)
    held_out = task.held_out(config.data.held_out)
    encode_queries(held_out, text, config.rollout.max_prompt)  # too long a query fails here, not later
    engine = Engine(graph, Placement(mesh, SAMPLING_TABLE), config.rollout.max_response, text.end_tokens)
    dtype = jnp.dtype(config.model.compute_dtype)
    optimizer = make_optimizer(config.optimizer, axes)
    learner = Learner(
        graph, placement, optimizer, config.loss, dtype, config.optimizer.logit_chunk, config.optimizer.remat
    )
    state = init_state(placement, optimizer, axes, read_params(source, architecture))
    reference = None
    if config.loss.kl_coefficient > 0:
        reference = jax.tree.map(jnp.copy, state.params)  # the state is donated to updates
    stream = QueryStream(task, text, config.rollout.max_prompt, config.seed)
    return Run(config, source, placement, axes, engine, learner, stream, held_out, reference), state


def explore_root(
    run: Run, params: Params, step: int, queries: Queries, watch: Stopwatch
) -> tuple[States, np.ndarray, Rollouts, dict[str, Any]]:
    """A round without positions (grpo, grpo++): M rollouts from every query.

    Returns:
      As `return_and_explore`.
    """
    config = run.config
    with watch.stage("explore"):
        rollouts, _ = run.engine.first_return(
            params,
            run.engine.placement.place_rows(queries),
            run.sampling_key,
            step,
            config.explore.rollouts,
            config.rollout.temperature,
        )
        rollouts = jax.device_get(rollouts)
    n = queries.length.shape[0]
    root = np.zeros((n, 1), np.int32)
    states = States(np.arange(n, dtype=np.int32), root[:, 0], root, root == 0)
    nothing = np.zeros((n, config.rollout.max_response), np.int32)
    return states, nothing, rollouts, whole_answer_metrics(rollouts)


def return_and_explore(
    run: Run,
    params: Params,
    step: int,
    queries: Queries,
    problems: list[Problem],
    watch: Stopwatch,
) -> tuple[States, np.ndarray, Rollouts, dict[str, Any]]:
    """First return, positions, states, explore: stages 2 to 7 of the pipeline.

    Returns:
      (states, response int32 [N, S] of each kept trajectory, partial rollouts, metrics), on the host.
    """
    config = run.config
    placed = run.engine.placement.place_rows(queries)
    with watch.stage("first_return"):
        base, caches = run.engine.first_return(
            params,
            placed,
            run.sampling_key,
            step,
            config.rollout.base_trajectories,
            config.rollout.temperature,
        )
        seen = jax.device_get(base)
    with watch.stage("verify"):
        r = config.rollout.base_trajectories
        answers = [row[:size] for row, size in zip(*flat_rows(seen), strict=True)]
        base_reward = run.reward(answers, [p for p in problems for _ in range(r)]).reshape(-1, r)

    round_key = jax.random.fold_in(jax.random.fold_in(run.choice_key, step), int(queries.index[0]))
    kept = keep_trajectories(jnp.asarray(base_reward), config.explore.keep, round_key)
    # Padded to a bucket, with trajectories that have no valid state, so that few shapes are compiled.
    query, trajectory = np.nonzero(np.asarray(kept))
    real = np.arange(run.engine.bucket(len(query))) < len(query)
    query, trajectory = np.pad([query, trajectory], [(0, 0), (0, len(real) - len(query))]).astype(np.int32)
    position, valid = positions_of(
        config.explore.rule,
        seen.entropy[query, trajectory],
        seen.logprob[query, trajectory],
        seen.length[query, trajectory],
        config.explore.positions,
        config.explore.min_gap,
        jax.vmap(row_key, (None, None, 0, 0))(run.choice_key, step, queries.index[query], trajectory),
    )
    prefix_length, valid = jax.device_get(states_of(position, valid))
    states = States(query, trajectory, prefix_length, valid & real[:, None])
    with watch.stage("explore"):
        rollouts = jax.device_get(
            run.engine.explore(
                params,
                placed,
                base,
                caches,
                run.engine.placement.place_rows(states),
                run.sampling_key,
                step,
                config.explore.rollouts,
                config.rollout.temperature,
            )
        )
    entropy = np.take_along_axis(seen.entropy[query, trajectory], prefix_length[:, 1:], axis=1)
    metrics = whole_answer_metrics(seen)
    metrics["reward/base_mean"] = float(base_reward.mean())
    restarted = entropy[states.valid[:, 1:]]
    metrics["entropy/positions"] = float(restarted.mean()) if restarted.size else 0.0
    metrics["tokens/generated"] += int(rollouts.length.sum())
    return states, seen.token[query, trajectory], rollouts, metrics


def flat_rows(rollouts: Rollouts) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N x C, S] and lengths [N x C] of rollouts on the host."""
    return rollouts.token.reshape(-1, rollouts.token.shape[-1]), rollouts.length.reshape(-1)


def whole_answer_metrics(rollouts: Rollouts) -> dict[str, Any]:
    """Metrics of answers that were sampled from the query alone."""
    tokens = int(rollouts.length.sum())
    return {
        "entropy/mean": float(rollouts.entropy.sum() / max(tokens, 1)),
        "response/length": float(rollouts.length.mean()),
        "response/cut": float(1.0 - rollouts.stopped.mean()),
        "tokens/generated": tokens,
    }


def sample_round(
    run: Run, params: Params, step: int, position: int, watch: Stopwatch
) -> tuple[StateGroups, dict[str, Any], dict[str, Any] | None]:
    """One round of the pipeline, up to the states that carry a gradient.

    Args:
      params: in the layout for sampling.
      position: of the round's first query in the stream.

    Returns:
      (accepted states, metrics, a state with two of its continuations for people to read).
    """
    config = run.config
    queries, problems = run.stream.take(position, config.rollout.queries)
    if config.explore.positions:
        states, response, rollouts, metrics = return_and_explore(run, params, step, queries, problems, watch)
    else:
        states, response, rollouts, metrics = explore_root(run, params, step, queries, watch)

    with watch.stage("verify"):
        reward = verify_rollouts(run, problems, states, response, rollouts)
    credit = config.credit
    advantage, value, alpha = jax.device_get(
        modulated_advantage(
            jnp.asarray(reward),
            states.valid,
            credit.normalize_std,
            credit.modulation,
            credit.first_state,
            credit.sharpen,
        )
    )
    accepted = np.asarray(accept_states(jnp.asarray(reward), states.valid, states.query, credit.reject))
    metrics |= {
        "reward/root_mean": float(value[states.valid[:, 0], 0].mean()),
        "value/mean": float(value[states.valid].mean()),
        "modulation/mean": float(alpha[states.valid].mean()),
        "states/accepted": int(accepted.sum()),
        "states/rejected": int((states.valid & ~accepted).sum()),
    }
    gathered = groups.collect(accepted, queries, response, states, rollouts, advantage)
    return gathered, metrics, read_state(run, problems, accepted, states, response, rollouts, reward)


def verify_rollouts(
    run: Run, problems: list[Problem], states: States, response: np.ndarray, rollouts: Rollouts
) -> np.ndarray:
    """Rewards of whole answers, prefix and continuation decoded together.

    Returns:
      float32 [N, J, M], 0 where the state is invalid.
    """
    n, j = states.valid.shape
    m = rollouts.length.shape[1] // j
    reward = np.zeros((n, j, m), np.float32)
    where = [(a, b, c) for a, b in np.argwhere(states.valid) for c in range(m)]
    answers = [whole_answer(states, response, rollouts, *place) for place in where]
    reward[tuple(np.array(where).T)] = run.reward(answers, [problems[states.query[a]] for a, _, _ in where])
    return reward


def whole_answer(
    states: States, response: np.ndarray, rollouts: Rollouts, n: int, j: int, m: int
) -> np.ndarray:
    """Token ids of rollout m of state j of trajectory n, its prefix included."""
    branch = j * (rollouts.length.shape[1] // states.valid.shape[1]) + m
    own = rollouts.token[n, branch, : rollouts.length[n, branch]]
    return np.concatenate([response[n, : states.prefix_length[n, j]], own])


def read_state(
    run: Run,
    problems: list[Problem],
    accepted: np.ndarray,
    states: States,
    response: np.ndarray,
    rollouts: Rollouts,
    reward: np.ndarray,
) -> dict[str, Any] | None:
    """The deepest accepted state of the round's first trajectory that has one, as text."""
    if not accepted.any():
        return None
    n = int(np.argmax(accepted.any(axis=1)))
    j = int(np.max(np.nonzero(accepted[n])))
    best, worst = int(np.argmax(reward[n, j])), int(np.argmin(reward[n, j]))
    size = states.prefix_length[n, j]
    first = j * reward.shape[2]
    answers = [whole_answer(states, response, rollouts, n, j, m) for m in (best, worst)]
    prefix, *continuations = run.stream.text.decode(
        [response[n, :size], *(answer[size:] for answer in answers)]
    )
    return {
        "question": problems[states.query[n]].question,
        "answer": problems[states.query[n]].answer,
        "prefix": prefix,
        "position": int(size),
        # The first draw from the state is the uncertain token itself.
        "entropy": round(float(rollouts.entropy[n, first, 0]), 4),
        "continuations": continuations,
        "rewards": [float(reward[n, j, best]), float(reward[n, j, worst])],
        "value": float(reward[n, j].mean()),
    }


def train_step(
    run: Run, state: TrainState, carried: StateGroups, progress: Progress
) -> tuple[TrainState, StateGroups, Progress, dict[str, Any], dict[str, Any] | None]:
    """Rounds until the batch is full, then the update.

    Raises:
      SamplingError: the batch is not full after `credit.max_rounds` rounds.
    """
    config, watch, started = run.config, Stopwatch(), time.perf_counter()
    step, position, wanted = progress.step + 1, progress.data_position, config.optimizer.batch_states
    rounds: list[dict[str, Any]] = []
    sample, waiting, sampler_params = None, carried, None
    while groups.count(waiting) < wanted:
        if len(rounds) == config.credit.max_rounds:
            raise SamplingError(
                f"step {step}: {len(rounds)} rounds gave {groups.count(waiting)} of {wanted} states "
                f"that carry a gradient (the other states' rollouts were all right or all wrong; mean "
                f"reward at the root {np.mean([r['reward/root_mean'] for r in rounds]):.3f}). Choose an "
                "easier or harder task, raise explore.rollouts, rollout.queries or credit.max_rounds, or "
                "lower optimizer.batch_states."
            )
        if sampler_params is None:
            sampler_params = run.sampling_params(state.params)
        accepted, metrics, sample = sample_round(run, sampler_params, step, position, watch)
        waiting = groups.join(waiting, accepted)
        position += config.rollout.queries
        rounds.append(metrics)
    batch, carried = groups.split(waiting, wanted)

    updates = []
    with watch.stage("update"):
        for epoch in range(config.optimizer.epochs):
            rng = np.random.default_rng((config.seed, step, epoch))
            for part in groups.minibatches(batch, config.optimizer.minibatches, rng):
                rows = run.placement.place_rows(groups.to_rows(part, config.optimizer.micro_rows), 1)
                state, metrics = run.learner.update(state, rows, run.reference)
                updates.append(metrics)
        updates = jax.device_get(updates)

    metrics = {"step": step} | summarize(rounds, updates)
    tokens = progress.tokens_generated + metrics.get("tokens/generated", 0)
    seconds = time.perf_counter() - started
    metrics |= {"states/carried": groups.count(carried), "tokens/total": tokens, "rounds": len(rounds)}
    metrics |= watch.metrics() | {"time/step": round(seconds, 4)}
    progress = Progress(step, position, tokens, progress.seconds + seconds, config.seed)
    return state, carried, progress, metrics, sample


def summarize(rounds: list[dict[str, Any]], updates: list[dict[str, Any]]) -> dict[str, Any]:
    """One number per metric: counts are added up over rounds, the rest averaged.

    A step that the carried states fill has no rounds, and none of their metrics.
    """
    metrics: dict[str, Any] = {}
    for name in rounds[0] if rounds else ():
        values = [r[name] for r in rounds]
        counted = name.startswith(("states/", "tokens/"))
        metrics[name] = sum(values) if counted else float(np.mean(values))
    reduce = {"ratio_max": np.max, "ratio_min": np.min}
    for name in updates[0]:
        values = [u[name] for u in updates]
        metrics[f"update/{name}"] = float(reduce.get(name, np.mean)(values))
    return metrics


def evaluate(run: Run, params: Params) -> float:
    """Share of the held-out problems that greedy decoding answers right."""
    params = run.sampling_params(params)
    rows, right = run.config.evaluate.rows, 0.0
    for start in range(0, len(run.held_out), rows):
        problems = run.held_out[start : start + rows]
        padded = problems + problems[:1] * (rows - len(problems))
        queries = encode_queries(padded, run.stream.text, run.config.rollout.max_prompt)
        placed = run.engine.placement.place_rows(queries)
        rollouts, _ = run.engine.first_return(params, placed, run.sampling_key, 0, 1, 0.0)
        answers = [row[:size] for row, size in zip(*flat_rows(jax.device_get(rollouts)), strict=True)]
        right += run.reward(answers, padded)[: len(problems)].sum()
    return float(right) / len(run.held_out)


def open_run_dir(config: Config, name: str) -> Path:
    """The run's directory, new or to be resumed; writes config.yaml.

    Raises:
      ConfigError: the directory holds a run that was started with other settings, or `resume: never`
        meets a checkpoint.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = Path(config.run_dir or f"runs/{name}-{stamp}")
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "config.yaml"
    if any((directory / "checkpoints").glob("[0-9]*")):
        if config.resume == "never":
            raise ConfigError(f"{directory} holds a checkpoint; choose another --run_dir, or --resume auto")
        changed = differing(yaml.safe_load(file.read_text()), yaml.safe_load(dump(config)))
        if changed:
            raise ConfigError(
                f"{directory} was started with other settings of {', '.join(changed)}; choose another "
                "--run_dir, or restore them as its config.yaml has them"
            )
    write_atomically(file, dump(config))
    return directory


RESUMABLE = {"steps", "run_dir", "resume", "evaluate", "checkpoint", "mesh"}


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the settings that a resumed run may not change and that differ."""
    names = []
    for key in sorted(set(new) - RESUMABLE):
        if isinstance(new[key], dict):
            names += [f"{key}.{k}" for k, v in new[key].items() if (old.get(key) or {}).get(k) != v]
        elif old.get(key) != new[key]:
            names.append(key)
    return names


def train(config: Config, name: str) -> dict[str, Any]:
    """Run or resume, and export the final model.

    Returns:
      What summary.json says.
    """
    config = resolve(config)
    run, state = setup(config)
    directory = open_run_dir(config, name)
    checkpoints = Checkpoints(directory, config.checkpoint.keep)
    progress = Progress(seed=config.seed)
    carried = groups.empty_groups(
        config.explore.rollouts, config.rollout.max_prompt, config.rollout.max_response
    )
    if (latest := checkpoints.latest()) is not None:
        state, carried, progress = checkpoints.restore(latest, state)

    with Reporter(directory, config.steps, progress.step) as reporter:
        reporter.say(
            f"{config.algorithm} on {config.model.path} | {config.data.task} | mesh "
            f"{dict(run.placement.mesh.shape)} on {jax.default_backend()} | run directory {directory}"
        )
        if progress.step:
            reporter.say(f"resumed from the checkpoint of step {progress.step}")
        else:
            question = run.stream.text.query(run.held_out[0].question)
            shown = run.stream.text.tokenizer.decode(question)
            reporter.say(f"the model sees, for example: {shown!r}")
            reporter.step({"step": 0, "eval/accuracy": evaluate(run, state.params), "tokens/total": 0})
        while progress.step < config.steps:
            state, carried, progress, metrics, sample = train_step(run, state, carried, progress)
            every, last = config.evaluate.every, progress.step == config.steps
            if last or (every and progress.step % every == 0):
                started = time.perf_counter()
                metrics["eval/accuracy"] = evaluate(run, state.params)
                metrics["time/evaluate"] = round(time.perf_counter() - started, 4)
            reporter.step(metrics, sample)
            if last or progress.step % config.checkpoint.every == 0:
                checkpoints.save(state, carried, progress)
        checkpoints.close()
        export_model(run.source, directory / "model", state.params)
        return finish(reporter, directory, progress)


def finish(reporter: Reporter, directory: Path, progress: Progress) -> dict[str, Any]:
    """Write and show the summary."""
    accuracies = [m["eval/accuracy"] for m in read_metrics(directory) if "eval/accuracy" in m]
    summary = {
        "accuracy_before": accuracies[0],
        "accuracy_after": accuracies[-1],
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "tokens_generated": progress.tokens_generated,
        "seed": progress.seed,
    }
    reporter.summary(
        summary,
        {
            "held-out accuracy before": f"{accuracies[0]:.1%}",
            "held-out accuracy after": f"{accuracies[-1]:.1%}",
            "steps": f"{progress.step} in {progress.seconds:.0f} s",
            "tokens generated": f"{progress.tokens_generated:,}",
            "model": str(directory / "model"),
            "checkpoints": str(directory / "checkpoints"),
            "metrics": str(directory / "metrics.jsonl"),
            "rollouts to read": str(directory / "samples.jsonl"),
            "log": str(directory / "log.txt"),
        },
    )
    return summary


def main() -> None:
    """Parse the command line and run; a user's mistake is one line and exit code 2."""
    config, name = parse(Config, "train", "configs/quickstart.yaml")
    try:
        train(config, name)
    except (ConfigError, PlacementError, CheckpointError) as error:
        fail("train", error)
    except SamplingError as error:
        fail("train", error, code=1)


if __name__ == "__main__":
    main()
