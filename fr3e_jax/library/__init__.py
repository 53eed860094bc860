"""The stages of FR3E for a notebook: load a model, sample, restart, judge, and update, one call each.

    import fr3e_jax as fr3e

    model = fr3e.Model.load("Qwen/Qwen2.5-0.5B-Instruct", template="boxed")
    engine = model.engine(max_response=512)
    queries = model.encode(["What is 12 * 13?", "What is 17 + 5?"])
    base = engine.first_return(queries, count=4)
    states = fr3e.states(base, rule="entropy", count=4)
    rollouts = engine.explore(base, states, count=16)
    reward = fr3e.judge(model.texts(states, rollouts), lambda question, answer: "156" in answer)
    advantage, value, alpha = fr3e.modulated_advantage(reward, states.valid)
    learner = model.learner(fr3e.LossConfig(), fr3e.OptimizerConfig(learning_rate=1e-6))
    state, metrics = learner.update(learner.init(), fr3e.groups(states, rollouts, advantage))
    model = model.updated(state)

These are the programs that training runs. Nothing here sets signal handlers or environment variables. Arrays
are numpy arrays on the host, whose shapes README's words name: B queries, R base trajectories, N kept ones, J
states of each, M partial rollouts of each state, S tokens.
"""

from fr3e_jax.algorithm.credit import modulated_advantage
from fr3e_jax.library.model import Explorer, Model, PolicyLearner
from fr3e_jax.library.results import Answers, Base, Encoded, Restarts
from fr3e_jax.library.stages import groups, judge, states

__all__ = [
    "Answers",
    "Base",
    "Encoded",
    "Explorer",
    "Model",
    "PolicyLearner",
    "Restarts",
    "groups",
    "judge",
    "modulated_advantage",
    "states",
]
