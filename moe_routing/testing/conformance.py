"""``RouterConformance``: the contract as a test class, a method a point. Importing this imports neither torch nor pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import pytest

    from moe_routing.testing.cases import Profile
    from moe_routing.testing.checks import Item

_FAILED = "{id}\n{sentence}\n{message}"


class RouterConformance:
    """Subclass this in a test file, name a backend, and pytest runs the contract against it.

    :cvar backend: the backend's name; without one, the option ``--moe-backend`` says.
    :cvar device: the device, ``"cpu"`` unless this or ``--moe-device`` says otherwise.
    :cvar profile: ``"quick"``, ``"smoke"`` or ``"full"``; the option ``--moe-full`` overrides it.

    A check that the backend's card declines, that its ``gaps`` excuse, or that makes no sense on the device, is a skip
    with the reason; ``moe-routing conformance`` writes the same into a report.
    """

    backend: ClassVar[str] = ""
    device: ClassVar[str] = ""
    profile: ClassVar[Profile] = "quick"

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Give each method the checks of its point on all their cases."""
        option = metafunc.config.getoption
        backend = cls.backend or option("--moe-backend", default=None)
        if not backend:
            message = f"{cls.__name__}: name a backend, as the class attribute `backend` or with --moe-backend"
            raise ValueError(message)
        from moe_routing.testing import checks

        device = cls.device or option("--moe-device", default=None) or "cpu"
        profile: Profile = "full" if option("--moe-full", default=False) else cls.profile
        point = int(metafunc.function.__name__.split("_")[1])
        items = [item for check in checks.CHECKS if check.point == point for item in check.items(profile)]
        names = [f"{item.id}-{backend}-{device}" for item in items]
        metafunc.parametrize(("item", "subject"), [(item, (backend, device)) for item in items], ids=names)

    @staticmethod
    def _hold(item: Item, subject: tuple[str, str]) -> None:
        import pytest

        from moe_routing.testing.kit import evaluate, subject_of

        __tracebackhide__ = True
        result = evaluate(item, subject_of(*subject))
        if result.status == "failed":
            pytest.fail(_FAILED.format(id=result.id, sentence=item.check.sentence, message=result.message), pytrace=False)
        if result.status != "passed":
            pytest.skip(f"{result.status}: {result.message}")

    def test_00_honest_card(self, item: Item, subject: tuple[str, str]) -> None:
        """What the card accepts works; what it declines cannot be had, or is a gap with a reason."""
        self._hold(item, subject)

    def test_01_order_and_ties(self, item: Item, subject: tuple[str, str]) -> None:
        """Ids come by descending selection score, equal scores by ascending id, -0 equal to +0."""
        self._hold(item, subject)

    def test_02_valid_ids(self, item: Item, subject: tuple[str, str]) -> None:
        """Ids are unique and in [0, E), whatever the input."""
        self._hold(item, subject)

    def test_03_non_finite(self, item: Item, subject: tuple[str, str]) -> None:
        """NaN counts as -inf, logits are clamped to float32's range, weights are never NaN or inf."""
        self._hold(item, subject)

    def test_04_exact_selection(self, item: Item, subject: tuple[str, str]) -> None:
        """Selection is exact in float32, and made on the logits where that is the same."""
        self._hold(item, subject)

    def test_05_gathered_weights(self, item: Item, subject: tuple[str, str]) -> None:
        """Weights are gathered from the unbiased scores, never recovered by subtracting the bias."""
        self._hold(item, subject)

    def test_06_weights_and_dtypes(self, item: Item, subject: tuple[str, str]) -> None:
        """Weights are float32, within rtol 2e-6; ids are int32, or int64 on request; contiguous."""
        self._hold(item, subject)

    def test_07_bad_arguments(self, item: Item, subject: tuple[str, str]) -> None:
        """A wrong argument is a ValueError or TypeError that names it, before any launch."""
        self._hold(item, subject)

    def test_08_strides(self, item: Item, subject: tuple[str, str]) -> None:
        """Any strides and offsets, past 2**31 elements too; row strides cost no copy."""
        self._hold(item, subject)

    def test_09_no_tokens(self, item: Item, subject: tuple[str, str]) -> None:
        """No tokens: empty outputs, and nothing is launched."""
        self._hold(item, subject)

    def test_10_batch_invariance(self, item: Item, subject: tuple[str, str]) -> None:
        """A row's bits do not depend on the other rows, their number or its position."""
        self._hold(item, subject)

    def test_11_determinism(self, item: Item, subject: tuple[str, str]) -> None:
        """The same input gives the same bits in every run."""
        self._hold(item, subject)

    def test_12_streams_and_graphs(self, item: Item, subject: tuple[str, str]) -> None:
        """No host synchronisation; CUDA graphs, current stream and tensor's device are honoured."""
        self._hold(item, subject)

    def test_13_padding(self, item: Item, subject: tuple[str, str]) -> None:
        """Rows at or past num_valid_tokens get ids -1 and weights 0, without a synchronisation."""
        self._hold(item, subject)

    def test_14_compile_and_export(self, item: Item, subject: tuple[str, str]) -> None:
        """torch.compile(fullgraph=True), torch.export and fake tensors work, and opcheck passes."""
        self._hold(item, subject)

    def test_15_gradients(self, item: Item, subject: tuple[str, str]) -> None:
        """Gradients flow from the weights to logits and scale; selection has none."""
        self._hold(item, subject)
