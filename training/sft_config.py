"""The settings of stage `sft`."""

from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from training.stage import THREADS, StageConfig


class SftConfig(StageConfig):
    """The model and how it is trained."""

    added_later = frozenset(
        {
            "continuations",
            "moving_average",
            "steps",
            "step_form",
            "step_clusters",
            "step_clusters_shuffled",
            "global_interest",
            "temperature",
        }
    )

    base_model: str | None = Field(
        None, description="a checkpoint's folder, a hub name or smollm2-135m; absent: from scratch"
    )
    architecture: Literal["llama", "qwen3"] = "llama"
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    intermediate_size: PositiveInt = 384
    dropout: float = Field(0.2, ge=0, lt=1, description="of embeddings and of each block's output; not for base_model")
    max_history: PositiveInt = Field(50, description="most items in a prompt")
    item_memory: bool = Field(
        False, description="one row per code for input and output, from text and SASRec's vectors; from scratch only"
    )
    distillation: float = Field(
        0.0, ge=0, lt=1, description="share of the loss that is a teacher's: the item-kNN without the user's own doing"
    )
    continuations: int = Field(
        0, ge=0, description="sequences that SASRec and the item-kNN continue, to learn from what they expect there"
    )
    temperature: float = Field(
        1.0, gt=0, le=10, description="τ of LETTER's ranking-guided loss, also decoded at; from scratch only"
    )
    moving_average: float = Field(
        0.0, ge=0, lt=1, description="decay a step of the weights' average, which is then what is validated and kept"
    )
    steps: tuple[int, ...] = Field(
        (), description="S²GR's thinking steps before each code, such as [1,1,1] or [3,0,0]; from scratch only"
    )
    step_form: Literal["discrete", "continuous"] = Field(
        "discrete", description="continuous: a step reads the output before it too; the local engine alone serves it"
    )
    step_clusters: int = Field(
        0, ge=0, description="clusters of a level's codes that its step learns to tell apart; 0: steps are mere pauses"
    )
    step_clusters_shuffled: bool = Field(False, description="control: clusters that mean nothing")
    global_interest: float = Field(
        0.0, ge=0, description="weight of the first step's nearness to what a light decoder expects (λ); 0: none"
    )
    thinking: bool = Field(False, description="prompts with a think block, empty in this stage; for base_model only")
    batch_size: PositiveInt = 32
    max_epochs: PositiveInt = 30
    patience: PositiveInt = Field(4, description="epochs without a better validation loss before it stops")
    keep: Literal["best", "last"] = Field(
        "best", description="best: of validation loss, until patience ends; last: all of max_epochs (ranking gains on)"
    )
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_share: float = Field(0.05, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the forward pass (autocast)")
    device: str = Field("auto", description="auto: the launch's, else an accelerator if there is one; or cpu, cuda, …")
    threads: PositiveInt = Field(1, description=THREADS)
    seed: int = Field(0, ge=0)

    def identity(self) -> dict[str, Any]:
        """Not where it is computed either: a run may go on on another device."""
        return {name: value for name, value in super().identity().items() if name != "device"}

    @property
    def learns_from_more(self) -> bool:
        """Whether text vectors and the baselines are read, and not sequences alone."""
        return self.item_memory or self.distillation > 0 or self.continuations > 0

    @field_validator("item_memory")
    @classmethod
    def _needs_tables_of_its_own(cls, item_memory: bool, others: ValidationInfo) -> bool:
        if item_memory and others.data.get("base_model") is not None:
            raise ValueError("a base model brings its tables with it: leave sft.item_memory or sft.base_model out")
        return item_memory

    @field_validator("temperature")
    @classmethod
    def _needs_a_head_of_its_own(cls, temperature: float, others: ValidationInfo) -> float:
        if temperature != 1 and others.data.get("base_model") is not None:
            raise ValueError("a base model's head may be its input table: leave sft.temperature or sft.base_model out")
        return temperature

    @field_validator("steps", "step_clusters", "global_interest")
    @classmethod
    def _steps_are_learnt_from_scratch(
        cls, value: tuple[int, ...] | float, others: ValidationInfo
    ) -> tuple[int, ...] | float:
        if value and others.data.get("base_model") is not None:
            raise ValueError("thinking steps are for models from scratch: leave it or sft.base_model out")
        if value and others.field_name == "global_interest" and not any(others.data.get("steps", ())[:1]):
            raise ValueError("the general interest is what the step before the first code learns: give sft.steps too")
        return value

    @field_validator("step_form")
    @classmethod
    def _needs_steps(cls, step_form: str, others: ValidationInfo) -> str:
        if step_form == "continuous" and not any(others.data.get("steps", ())):
            raise ValueError("continuous is a form of thinking steps: give sft.steps too, such as [1,1,1]")
        return step_form

    @field_validator("thinking")
    @classmethod
    def _needs_words_to_think_in(cls, thinking: bool, others: ValidationInfo) -> bool:
        if thinking and others.data.get("base_model") is None:
            raise ValueError("a model from scratch knows SIDs only and cannot think: give sft.base_model too")
        return thinking
