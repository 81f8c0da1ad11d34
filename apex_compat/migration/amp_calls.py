"""Changes the calls of apex.amp in a script to torch.amp, all of them or none."""

from __future__ import annotations

import ast
from itertools import pairwise

from apex_compat.migration.arguments import bind, is_none, level_of, obstacle_of_arguments, scaler_options
from apex_compat.migration.names import Reference
from apex_compat.migration.order import Event, are_exclusive, in_loop_between, statements_to_update_after
from apex_compat.migration.region import find_region, merge
from apex_compat.migration.source import Source

ON_DEVICE = '"cuda" if torch.cuda.is_available() else "cpu"'
PRIVATE = ("_amp_stash", "_lazy_init_maybe_master_weights", "_master_params_to_model_params", "_amp_lazy_init")
INITIALIZE = (
    "GradScaler, and torch.autocast around the forward pass and the loss. O1 cast everywhere from here on: what is "
    "computed outside of the `with`, such as metrics, is now in float32. "
    "GradScaler starts at 2**16 as apex did, but knows no largest scale, where apex had 2**24"
)
REMARKS = {
    "apex.amp.initialize": INITIALIZE,
    "apex.amp.scale_loss": "scaler.scale(loss).backward(); gradients stay scaled until unscale_ or scaler.step. The "
    "scale moves in scaler.update(), once a step, where apex moved it at each backward",
    "apex.amp.master_params": "the optimizer's parameters, after scaler.unscale_(optimizer), once a step",
    "apex.amp.state_dict": "scaler.state_dict()",
    "apex.amp.load_state_dict": "scaler.load_state_dict(); it does not take the dict that apex saved",
    "apex.amp.disable_casts": "torch.autocast(device, enabled=False)",
    "apex.amp.half_function": "torch.amp.custom_fwd(cast_inputs=torch.float16) on an autograd function",
    "apex.amp.float_function": "torch.autocast(device, enabled=False), and .float() of the arguments",
    "apex.amp.promote_function": "nothing: torch promotes by itself",
    "apex.amp.register_half_function": "no such thing: cast the arguments where the function is called",
    "apex.amp.register_float_function": "no such thing: call it under autocast(enabled=False), with .float() arguments",
    "apex.amp.register_promote_function": "nothing: torch promotes by itself",
    "apex.amp.init": "torch.autocast around the forward pass and the loss, and GradScaler",
    "apex.amp._amp_state": "private: the scale is scaler.get_scale(), and scaler.update(new) sets it",
}
LEVELS = {
    "O0": "fp32: neither autocast nor GradScaler, but for loss_scale",
    "O2": "torch.amp has no half-precision weights with fp32 masters: autocast keeps the weights in fp32. Memory and "
    "numbers differ, and outputs are half precision, where O2 returned float32. O1 is what autocast is near to",
    "O3": "model.half() and a plain loop; torch.amp has no such mode",
}
ARGUMENTS = {
    "cast_model_type": "autocast takes it as dtype",
    "keep_batchnorm_fp32": "under autocast weights are always fp32",
    "master_weights": "under autocast weights are always fp32",
    "cast_model_outputs": "cast what the model returns",
    "num_losses": "one scale serves all losses; a GradScaler for each loss keeps them apart",
    "min_loss_scale": "GradScaler has no bounds",
    "max_loss_scale": "GradScaler has no bounds",
    "loss_id": "one scale serves all losses; a GradScaler for each loss keeps them apart",
    "delay_unscale": "gradients stay scaled by themselves; call scaler.step at the last micro-batch alone",
    "delay_overflow_check": "scaler.step looks at the sum of all micro-batches",
}
"""Argument of initialize or scale_loss -> what becomes of it."""


class AmpCalls:
    """The calls of apex.amp in a script.

    Args:
        source: the script.
        references: the uses of apex.amp in it.

    Attributes:
        obstacle: why they cannot be changed mechanically, or an empty text.
        remarks: (node, remark), for what is not a reference itself.
    """

    def __init__(self, source: Source, references: list[Reference]) -> None:
        self._source = source
        self._by_name: dict[str, list[ast.Call]] = {}
        self.remarks: list[tuple[ast.AST, str]] = []
        for reference in references:
            if reference.called:
                self._by_name.setdefault(reference.name, []).append(reference.called)
        self._starts = self._by_name.get("apex.amp.initialize", [])
        self._losses = self._by_name.get("apex.amp.scale_loss", [])
        self._models: set[str] = set()
        self._optimizers: set[str] = set()
        for call in self._starts:
            self._learn_names(call)
        self._methods = {method for start in self._starts for method in _methods_beside(source, start)}
        self._name_the_scaler()
        self._unscaled: list[tuple[str, ast.stmt]] = []
        self._updated: list[ast.stmt] = []
        self.obstacle = self._find_obstacle(references)

    def rewrite(self) -> None:
        """Change them."""
        for call in self._starts:
            self._rewrite_initialize(call)
        for region in self._regions():
            line = f"with torch.autocast({self._device}, torch.float16, enabled={self._scaler}.is_enabled()):"
            self._source.insert(region[0], [line])
            self._source.move(region, 4)
        for call in self._losses:
            self._rewrite_scale_loss(call)
        self._rewrite_gradients()
        self._rewrite_steps()
        for name in ("state_dict", "load_state_dict"):
            for call in self._by_name.get(f"apex.amp.{name}", []):
                self._source.replace(call.func, f"{self._scaler}.{name}")
        for call in self._by_name.get("apex.amp.disable_casts", []):
            self._source.replace(call, f"torch.autocast({self._device}, enabled=False)")

    # What the script is like

    def _name_the_scaler(self) -> None:
        """Choose names that the script does not have: of variables, or of attributes where a method initializes."""
        names: set[str] = set()
        for node in ast.walk(self._source.tree):
            names |= {str(getattr(node, kind)) for kind in ("id", "attr", "arg", "name") if hasattr(node, kind)}
        own = {f"{_first_argument(method)}." for start in self._starts for method in [self._method_of(start)] if method}
        prefix = "".join(own) if self._keeps_scaler_in_object() else ""
        self._scaler = prefix + ("scaler" if "scaler" not in names else "grad_scaler")
        self._device = prefix + ("amp_device" if "amp_device" not in names else "amp_device_type")

    def _method_of(self, node: ast.AST) -> ast.FunctionDef | None:
        """Return the method that a node is in, itself or in a function in it, of the class that initializes."""
        while node in self._source.parents and node not in self._methods:
            node = self._source.parents[node]
        return node if isinstance(node, ast.FunctionDef) and node in self._methods else None

    def _keeps_scaler_in_object(self) -> bool:
        return (
            len(self._starts) == 1 and bool(self._method_of(self._starts[0])) and self._used_elsewhere(self._starts[0])
        )

    def _obstacle_of_object(self) -> str:
        """Return why the scaler cannot be an attribute of the object whose method initializes, or an empty text."""
        if not any(self._method_of(call) and self._used_elsewhere(call) for call in self._starts):
            return ""
        if len(self._starts) > 1:
            return "amp.initialize is called more than once, and in a method"
        first = {_first_argument(method) for method in self._methods}
        for use in self._uses():
            method = self._method_of(use)
            if method is None or len(first) != 1:
                return f"line {use.lineno} uses amp outside of the methods of the class that calls amp.initialize"
        return ""

    def _learn_names(self, call: ast.Call) -> None:
        """Take the names of models and optimizers, of what goes in and of what comes out."""
        pairs: list[list[ast.expr]] = [call.args[0:2]]
        statement = self._source.parents[call]
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            two = isinstance(target, (ast.Tuple, ast.List)) and len(target.elts) == 2
            pairs.append(target.elts if two else [target])  # type: ignore[attr-defined]
        for models, *optimizers in filter(None, pairs):
            self._models |= _flat(models)
            self._optimizers |= {name for optimizer in optimizers for name in _flat(optimizer)}
        self._optimizers |= _flat(bind("apex.amp.initialize", call).get("optimizers"))
        for other in (*self._losses, *self._by_name.get("apex.amp.master_params", [])):
            self._optimizers |= {name for arg in other.args[-1:] for name in _flat(arg)}
        for node in ast.walk(self._source.tree):
            if isinstance(node, ast.For) and _flat(node.iter) & self._optimizers:
                self._optimizers |= _flat(node.target)

    def _find_obstacle(self, references: list[Reference]) -> str:
        private = [n for n in ast.walk(self._source.tree) if isinstance(n, ast.Attribute) and n.attr in PRIVATE]
        if private:
            self.remarks += [(node, "private: torch.amp has no masters") for node in private]
            return "the script uses private names of amp"
        if any(r.name == "apex.amp.init" or r.name.startswith("apex.amp._a") for r in references):
            return "the script uses amp.init or private names of amp"
        if not self._starts:
            return "amp.initialize is not called in this file, so the GradScaler must come from elsewhere"
        for call in self._starts:
            if line := obstacle_of_arguments(call):
                return line
            if not isinstance(self._source.parents[call], ast.Assign) or len(call.args) < 1:
                return "what amp.initialize returns is not assigned to names"
        obstacles = filter(None, (self._obstacle_of_loss(call) for call in self._losses))
        return next(obstacles, "") or self._obstacle_of_order()

    def _obstacle_of_order(self) -> str:
        """Return why gradients, steps and the scale would not fit together, or an empty text."""
        if not self._steps():
            return "no step() of the optimizer is found in this file"
        if obstacle := self._obstacle_of_object():
            return obstacle
        if any(call.args or call.keywords for call in self._steps()):
            return "scaler.step takes no closure"
        if obstacle := self._plan_updates() or self._plan_unscaling():
            return obstacle
        reads = [n for n in ast.walk(self._source.tree) if isinstance(n, ast.Attribute) and n.attr == "grad"]
        obstacles = (self._obstacle_of_gradient(node) for node in reads if isinstance(node.ctx, ast.Load))
        return next(filter(None, obstacles), "")

    def _obstacle_of_loss(self, call: ast.Call) -> str:
        item = self._source.parents[call]
        statement = self._source.parents.get(item)
        if not isinstance(statement, ast.With) or len(statement.items) != 1 or len(call.args) < 1:
            return f"line {call.lineno} has scale_loss in another form than `with amp.scale_loss(...) as name:`"
        if not isinstance(item.optional_vars, ast.Name):  # type: ignore[attr-defined]
            return f"line {call.lineno} gives the scaled loss no name"
        region = find_region(self._source, statement, call.args[0], self._models)
        if not region:
            return f"the forward pass that belongs to line {call.lineno} is in another function"
        inner = statement.body
        if not self._source.can_move(region) or not (self._source.can_move(inner) or self._is_plain(statement)):
            return f"the lines around line {call.lineno} cannot be moved: they share a line or a long string"
        return ""

    def _is_plain(self, statement: ast.With) -> bool:
        """Return True for `with ... as name: name.backward(...)` with nothing else in it."""
        first = statement.body[0]
        call = first.value if isinstance(first, ast.Expr) else None
        function = call.func if isinstance(call, ast.Call) else None
        name = statement.items[0].optional_vars
        return (
            len(statement.body) == 1
            and isinstance(function, ast.Attribute)
            and function.attr == "backward"
            and isinstance(name, ast.Name)
            and self._source.of(function.value) == name.id
            and self._source.between(name, first).strip() == ":"
        )

    def _regions(self) -> list[list[ast.stmt]]:
        """Return the statements that go under autocast, together where they follow each other."""
        found = []
        for call in self._losses:
            statement = self._source.statement(call)
            found.append(find_region(self._source, statement, call.args[0], self._models))
        return merge(self._source, found)

    # The changes

    def _rewrite_initialize(self, call: ast.Call) -> None:
        source = self._source
        statement = source.parents[call]
        assert isinstance(statement, ast.Assign)  # noqa: S101  _find_obstacle has looked
        options = scaler_options(call)
        arguments = bind("apex.amp.initialize", call)
        for option in options:
            if option.startswith("init_scale="):
                line = f"GradScaler has no static scale: it starts at init_scale, here {option[11:]}, and moves"
                self.remarks.append((arguments["loss_scale"], line))
        lines = [f"{self._scaler} = torch.amp.GradScaler({', '.join([self._device, *options])})"]
        outermost = source.above(statement)[-1]
        definition = [f"{self._device} = {ON_DEVICE}"]
        if self._used_elsewhere(call) and "." not in self._scaler:
            definition.insert(0, f"global {self._device}, {self._scaler}")
        if outermost is statement:
            lines[:0] = definition
        else:  # it may not be reached: then a scaler that does nothing serves
            definition.append(f"{self._scaler} = torch.amp.GradScaler({self._device}, enabled=False)")
            source.insert(outermost, definition)
        given = [arguments[name] for name in ("models", "optimizers") if not is_none(arguments.get(name))]
        targets = " = ".join(source.of(target) for target in statement.targets)
        if targets.strip("()") == ", ".join(map(source.of, given)):
            source.replace(statement, source.join(statement, lines))
            return
        # The arguments stay where they are: there may be apex's calls in them.
        source.replace_between(source.start(statement), source.start(given[0]), f"{targets} = ")
        for one, other in pairwise(given):
            source.replace_between(source.end(one), source.start(other), ", ")
        source.replace_between(source.end(given[-1]), source.end(statement), source.join(statement, ["", *lines]))

    def _uses(self) -> list[ast.Call]:
        uses = [c for name, calls in self._by_name.items() if name.startswith("apex.amp.") for c in calls]
        return [*uses, *self._steps(), *(clip for clip, _ in self._clips())]

    def _used_elsewhere(self, call: ast.Call) -> bool:
        scope = self._source.scope(call)
        return not isinstance(scope, ast.Module) and any(self._source.scope(use) is not scope for use in self._uses())

    def _rewrite_scale_loss(self, call: ast.Call) -> None:
        source = self._source
        statement = source.parents[source.parents[call]]
        assert isinstance(statement, ast.With)  # noqa: S101  _find_obstacle has looked
        scaled = f"{self._scaler}.scale({source.of(call.args[0])})"
        if self._is_plain(statement):
            backward = statement.body[0]
            assert isinstance(backward, ast.Expr) and isinstance(backward.value, ast.Call)  # noqa: S101, PT018
            arguments = source.of(backward.value)[len(source.of(backward.value.func)) :]
            source.replace(statement, f"{scaled}.backward{arguments}")
            return
        name = source.of(statement.items[0].optional_vars)  # type: ignore[arg-type]
        source.replace_header(statement, f"{name} = {scaled}")
        source.move(statement.body, statement.col_offset - statement.body[0].col_offset)

    def _clips(self) -> list[tuple[ast.Call, str]]:
        """Return the calls that clip gradients, or see them by master_params, with the optimizer that is meant."""
        found = []
        masters = self._by_name.get("apex.amp.master_params", [])
        for call in masters:
            found.append((call, self._source.of(call.args[0]) if call.args else ""))
        inside = {id(node) for call in masters for node in self._around(call)}
        for node in ast.walk(self._source.tree):
            if isinstance(node, ast.Call) and _last_name(node.func).startswith("clip_grad_") and id(node) not in inside:
                steps = [step for step in self._steps() if self._source.scope(step) is self._source.scope(node)]
                optimizers = {self._source.of(step.func.value) for step in steps}  # type: ignore[attr-defined]
                found.append((node, optimizers.pop() if len(optimizers) == 1 else ""))
        return sorted(found, key=lambda clip: self._source.start(clip[0]))

    def _around(self, node: ast.AST) -> list[ast.AST]:
        around = [node]
        while node in self._source.parents and not isinstance(node, ast.stmt):
            node = self._source.parents[node]
            around.append(node)
        return around

    def _plan_unscaling(self) -> str:
        """Find before which statements gradients are unscaled; return an obstacle if they cannot be, once a step."""
        source = self._source
        for call, optimizer in self._clips():
            statement = source.statement(call)
            later = [step for step in self._steps_of(optimizer) if source.start(step) > source.start(call)]
            blocks = [source.block(source.statement(step)) for step in later]
            if not any(in_loop_between(source, statement, block) is False for block in blocks):
                return (
                    f"line {call.lineno} looks at gradients elsewhere than before a step of its optimizer, once a step"
                )
            before = [other for name, other in self._unscaled if name == optimizer and self._same_step(other, call)]
            around = [source.block(other) for other in source.above(statement)]
            if any(source.block(other) in around for other in before):
                continue
            if not all(are_exclusive(source, other, statement) for other in before):
                return f"line {call.lineno} looks at gradients a second time; unscale_ may run once a step"
            self._unscaled.append((optimizer, statement))
        return ""

    def _same_step(self, one: ast.stmt, other: ast.expr) -> bool:
        """Return True if two nodes are in one function, the first before the second, without a step between."""
        source = self._source
        between = [s for s in self._steps() if source.start(one) < source.start(s) < source.start(other)]
        return source.scope(one) is source.scope(other) and not between

    def _obstacle_of_gradient(self, node: ast.Attribute) -> str:
        """Return why a gradient that is read would be another number, or an empty text."""
        source = self._source
        parent = source.parents[node]
        while isinstance(parent, ast.Attribute) and parent.attr == "data":
            parent = source.parents[parent]
        harmless = isinstance(parent, ast.Attribute) and parent.attr in ("zero_", "detach_")
        if harmless or (isinstance(parent, ast.Compare) and isinstance(parent.ops[0], (ast.Is, ast.IsNot))):
            return ""
        above = source.above(node)
        withs = [source.parents[source.parents[call]] for call in self._losses]
        if any(statement in withs for statement in above):
            return ""  # apex unscales at the end of the `with`
        unscaled = [other for _, other in self._unscaled] + [source.statement(step) for step in self._steps()]
        starts = [source.start(call) for call in self._losses if source.start(call) < source.start(node)]
        blocks = [source.block(statement) for statement in above]
        for other in unscaled:
            if source.block(other) in blocks and max(starts, default=0) < source.start(other) <= source.start(node):
                names = {source.of(step.func.value) for step in self._steps()}  # type: ignore[attr-defined]
                if len(names) == 1 and self._is_parameter(node.value):
                    return ""
        return f"line {node.lineno} reads a gradient that is still times the scale there"

    def _is_parameter(self, node: ast.expr) -> bool:
        """Return True for a part of a model, and for what a loop takes from parameters."""
        text = ast.unparse(node)
        if any(text.startswith(f"{model}.") for model in self._models):
            return True
        for loop in ast.walk(self._source.tree):
            if isinstance(loop, (ast.For, ast.comprehension)) and text in _names(loop.target):
                words = {_last_name(part) for part in ast.walk(loop.iter) if isinstance(part, ast.expr)}
                if words & {"parameters", "named_parameters", "master_params"}:
                    return True
        return False

    def _rewrite_gradients(self) -> None:
        """Unscale the gradients before they are looked at."""
        for call, optimizer in self._clips():
            if _last_name(call.func) == "master_params":
                self._source.replace(call, f'(p for group in {optimizer}.param_groups for p in group["params"])')
        for optimizer, statement in self._unscaled:
            self._source.insert(statement, [f"{self._scaler}.unscale_({optimizer})"])

    def _steps_of(self, optimizer: str) -> list[ast.Call]:
        return [step for step in self._steps() if self._source.of(step.func.value) == optimizer]  # type: ignore[attr-defined]

    def _steps(self) -> list[ast.Call]:
        """Return the calls `optimizer.step()`."""
        return [
            node
            for node in ast.walk(self._source.tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "step"
            and self._source.of(node.func.value) in self._optimizers
        ]

    def _plan_updates(self) -> str:
        """Find after which statements the scale is updated; return an obstacle if there is no place for that."""
        source = self._source
        losses, steps = [], []
        for call in self._losses:
            names = _flat(bind("apex.amp.scale_loss", call).get("optimizers"))
            losses.append(Event(source.statement(call), source.scope(call), frozenset(names), source.start(call)))
        for call in self._steps():
            names = {source.of(call.func.value)}  # type: ignore[attr-defined]
            statement = self._after_all_optimizers(source.statement(call), call)
            if isinstance(statement, ast.For):
                names |= _flat(statement.iter)
            steps.append(Event(statement, source.scope(call), frozenset(names), source.start(call)))
        self._updated, obstacle = statements_to_update_after(source, losses, sorted(steps, key=lambda step: step.at))
        return obstacle

    def _rewrite_steps(self) -> None:
        for call in self._steps():
            optimizer = self._source.of(call.func.value)  # type: ignore[attr-defined]
            self._source.replace(call, f"{self._scaler}.step({optimizer})")
            self.remarks.append(
                (call, "scaler.step(optimizer); scaler.update(): it skips the step if a gradient is inf")
            )
        for statement in self._updated:
            self._source.insert(statement, [f"{self._scaler}.update()"], after=True)

    def _after_all_optimizers(self, statement: ast.stmt, step: ast.Call) -> ast.stmt:
        """Return the loop over the optimizers that a step is in, or else the statement of the step itself."""
        for around in self._source.above(statement):
            if isinstance(around, ast.For) and _names(around.target) & _names(step.func):
                return around
        return statement


def amp_remark(reference: Reference, obstacle: str) -> list[str]:
    """Return what a use of apex.amp is in torch.amp."""
    other = "used as a value; it is imported from apex_compat now: see to it" if reference.name == "apex.amp" else ""
    name = "apex.amp._amp_state" if reference.name.startswith("apex.amp._amp_state") else reference.name
    lines = [REMARKS.get(name, other or "torch.amp has nothing like it; apex_compat keeps it")]
    call = reference.called
    if reference.name == "apex.amp.initialize" and call:
        level = level_of(call)
        if level in LEVELS:
            lines = [f"{level}: {LEVELS[level]}"]
        elif level is None:
            lines.append(
                "the opt_level is not written here: this is what O1 is, and O0 with enabled=False. O2 has no equal in "
                "torch.amp, and O3 is model.half(): a run at either becomes one at O1"
            )
    if call:
        lines += [f"{name}: {ARGUMENTS[name]}" for name in bind(name, call) if name in ARGUMENTS]
    if obstacle and reference.name in ("apex.amp.initialize", "apex.amp.scale_loss"):
        lines.append(f"left as it is: {obstacle}")
    return lines


def _methods_beside(source: Source, call: ast.Call) -> list[ast.FunctionDef]:
    """Return the methods of the class in one of whose methods `call` is; none if it is in no class."""
    node: ast.AST = call
    while node in source.parents:
        node, inner = source.parents[node], node
        if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef):
            return [m for m in node.body if isinstance(m, ast.FunctionDef) and m.args.args and not m.decorator_list]
    return []


def _first_argument(method: ast.FunctionDef) -> str:
    return method.args.args[0].arg


def _flat(node: ast.expr | None) -> set[str]:
    """Return the texts of `node`, or of its elements if it is a tuple or a list."""
    if node is None:
        return set()
    if isinstance(node, (ast.Tuple, ast.List)):
        return {name for element in node.elts for name in _flat(element)}
    return {ast.unparse(node)} if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) else set()


def _names(node: ast.expr) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
