"""What a run can be told: one dataclass per TOML section, a sentence of why under each field."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    """Name of the run: the name of its folder, and of the run in wandb."""
    dir: str = "runs"
    """Folder that holds the run folders; relative to where the command is started."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    seed: int = 0
    """Key of every random decision: initial weights, order of the samples, masks, dropout."""
    total_steps: int
    """Updates of the whole run; the learning rate's decay ends here."""
    global_batch_size: int
    """Sequences of one update, over all processes and micro-steps; the same at any world size."""
    micro_batch_size: int
    """Sequences of one forward and backward of one data-parallel rank; as many as memory holds."""
    precision: str = "bf16"
    """Number format of forward and backward, "bf16" or "fp32"; weights and moments are fp32 in both."""
    max_grad_norm: float = 0.0
    """Gradients are scaled down to this global L2 norm; 0 = no clipping, as RoBERTa."""
    activation_checkpointing: int = 0
    """Layers whose activations are computed again in the backward: 0 = none, 1 = all, k = every k-th; saves memory."""
    init_from: str = ""
    """Hub folder whose weights the run starts from; "" = drawn from the seed."""
    threads: int = 0
    """CPU threads of torch in each process; 0 = the machine's cores divided by its processes."""
    stop_after: int = 0
    """Stop with a checkpoint once so many updates are done, in an unchanged schedule; 0 = at total_steps."""
    grace_seconds: float = 30.0
    """Time from a SIGTERM or SIGUSR1 to the SIGKILL after it, 30 s under DeepSpeed's launcher; a checkpoint that would
    take longer, as the last one tells, is not begun; 0 = no limit."""
    hang_seconds: float = 1200.0
    """An update, checkpoint or export that lasts longer ends the job, with every rank's stacks in <run>/stacks; below
    the half hour after which torch gives up without them; 0 = never."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor_parallel: int = 1
    """Processes that share each layer's matrices; the rest of the world is data-parallel."""
    sequence_parallel: bool = False
    """Each tensor-parallel rank holds its share of the tokens only, wherever the whole is not needed: less memory."""
    zero_stage: int = 3
    """What DeepSpeed spreads over the data-parallel ranks: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights."""
    offload_optimizer: str = "none"
    """Where the optimizer's state and its update are: "none" = with the weights, "cpu" or "nvme"."""
    offload_folder: str = ""
    """Folder on a local NVMe disk, for offload_optimizer = "nvme"."""
    self_check: bool = True
    """Before the first update a tiny model of the same kind must give plain torch's loss and gradients: seconds."""
    drift_check_every: int = 100
    """Updates between two comparisons of what all tensor-parallel ranks hold alike; 0 = before checkpoints only."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    model_type: str
    """Family as the Hub names it: "xlm-roberta-xl" (pre-LN), "xlm-roberta", "roberta" (post-LN), "xmod" (adapters)."""
    vocab_size: int
    """Rows of the word embedding; at least the tokenizer's ids, the rest is padding that is never sampled."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Number of encoder layers."""
    num_attention_heads: int
    """Heads of each attention; the head dimension is hidden_size / num_attention_heads."""
    intermediate_size: int
    """Width inside the feed-forward network, four times hidden_size in all published shapes."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward network and of the adapters: "gelu" (erf), "gelu_new" (tanh), "relu" or "silu"."""
    hidden_dropout_prob: float = 0.1
    """Dropout on the embeddings and on what each sublayer adds to the residual stream."""
    attention_probs_dropout_prob: float = 0.1
    """Dropout on the attention weights."""
    classifier_dropout: float | None = None
    """Dropout in the classification heads; left out = hidden_dropout_prob."""
    max_position_embeddings: int = 514
    """Rows of the position embedding: the first token is at pad_token_id + 1, so 514 rows mean 512 tokens."""
    type_vocab_size: int = 1
    """Rows of the token type embedding; every id used is 0 unless token_type_ids are given."""
    position_embedding_type: str = "absolute"
    """"absolute", or distances inside every attention, "relative_key" or "relative_key_query" (transformers 4 only)."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights of linear layers and embeddings."""
    pad_token_id: int = 1
    """Id that fills short sequences; its embedding row stays zero."""
    bos_token_id: int = 0
    """Id of <s>, the first token of every sequence."""
    eos_token_id: int = 2
    """Id of </s>, the last token of every document."""
    is_decoder: bool = False
    """A token attends to itself and to what stands before it only."""
    add_cross_attention: bool = False
    """Every layer of a decoder also attends to the states of another encoder."""
    use_cache: bool = True
    """Whether a decoder gives its keys and values back by default, for generation."""
    languages: list[str] = field(default_factory=list)
    """Languages that have an adapter in every layer, xmod only; a language's id is its place here."""
    default_language: str = ""
    """Language of a sample that comes without a language id, xmod only; "" = every sample must have one."""
    pre_norm: bool = False
    """A sublayer normalises its input, and a LayerNorm follows the last layer; xmod only, others follow the family."""
    adapter_reduction_factor: int = 2
    """hidden_size divided by the width inside an adapter."""
    adapter_layer_norm: bool = False
    """A LayerNorm of its own, shared by all languages of a layer, stands before the adapter."""
    adapter_reuse_layer_norm: bool = True
    """Without it, the feed-forward network's LayerNorm stands there too."""
    ln_before_adapter: bool = True
    """That LayerNorm comes before the residual branches off, not only on the adapter's input."""
    num_labels: int = 2
    """Classes of the classification heads."""
    id2label: dict[str, str] = field(default_factory=dict)
    """Name of every class by its number, as {"0" = "no", "1" = "yes"}; empty = LABEL_0 and so on."""
    problem_type: str = ""
    """"regression", "single_label_classification" or "multi_label_classification"; "" = by the labels given."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str
    """Folder of the text shards, one folder per language, or its URL (s3://, gs://, hf://, https://)."""
    tokenizer: str
    """Folder of the tokenizer, laid out as on the Hub."""
    sequence_length: int = 512
    """Tokens of every sample, <s> included."""
    languages: list[str] = field(default_factory=list)
    """Languages to train on, by the codes of xlscale/languages.py; empty = all that the shards hold."""
    sampling_alpha: float = 0.3
    """p(language) ~ n_language ** alpha: 1.0 follows the corpus, lower favours small languages."""
    sampling_over: str = "tokens"
    """What n_language counts: "documents", "bytes" or "tokens"."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """p(language) ~ its weight, in place of n ** alpha; one for every language, or none at all."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """Other sampling from a step on, as [{step = 9000, alpha = 0.5, languages = ["de_DE"], weights = {de_DE = 2.0}}];
    a key that is left out stays as it was, languages = [] are all; a language not named is not drawn."""
    language_run: int = 1
    """So many samples in a row have one language, for adapters that are routed by language."""
    languages_per_micro_step: int = 0
    """A micro-step has at most so many languages, the same on all ranks, each of which has an equal part of every run
    of samples; 0 = as they come, which a model with adapters cannot have."""
    lanes: int = 0
    """Parts of the global batch that each read chunks of their own, so that a rank tokenises few; frozen in the
    checkpoint; 0 = the largest divisor of the batch's runs that also divides 64."""
    packing: str = "sentences"
    """Documents to samples: "sentences" run on from sample to sample, "documents" have samples of their own,
    "best_fit" puts short ones together so that little is padded."""
    document_attention: bool = True
    """Tokens of a sample attend to other documents in it too; false keeps documents apart, each from position 0."""
    tokenize: str = "ahead"
    """"ahead" keeps all ids on the disk, "on_the_fly" only how many there are; the samples are the same."""
    max_document_characters: int = 10_000_000
    """A document above this is a fault, and left out."""
    cache: str = ""
    """Folder of what is derived from the text shards, token shards and indices, or the URL of a finished one;
    "" = the folder `tokens` beside the shards."""
    download_folder: str = ""
    """Where files of remote folders are kept while they are in use; "" = `downloads` in the run's folder."""
    download_gib: float = 50.0
    """GiB that download_folder may take; what was used longest ago goes first."""
    workers: int = 1
    """Loader processes of each training process; 0 = the batches are made in the training process itself."""
    prefetch: int = 2
    """Updates whose batches are made ahead by the loader processes."""
    allow_changes: list[str] = field(default_factory=list)
    """What may differ from the checkpoint's stream, as ["corpus"]: its name is in the refusal; recorded as an event."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    mlm_probability: float = 0.15
    """Probability that a token is to be predicted."""
    mlm_probability_schedule: list[list[float]] = field(default_factory=list)
    """[[step, probability], ...]: linear between the points, mlm_probability before the first, the last one's after."""
    unit: str = "token"
    """What is hidden as a whole: "token", "word" (a piece, where a script has no spaces) or "span" of words."""
    span_p: float = 0.2
    """Lengths of spans in words are geometric with this probability (SpanBERT), up to span_max."""
    span_max: int = 10
    """Longest span in words."""
    mask_fraction: float = 0.8
    """Fraction of the predicted tokens that are replaced by <mask>."""
    random_fraction: float = 0.1
    """Fraction of the predicted tokens that are replaced by a random piece; the rest keeps its token."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float
    """Peak learning rate of AdamW, reached at the end of the warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; biases and LayerNorms have none."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    warmup_steps: int
    """Updates in which the learning rate rises linearly from 0 to its peak."""
    decay: str = "linear"
    """How it falls from the peak to the end: a key of DECAYS in xlscale/training/schedule.py."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 1000
    """Updates between two checkpoints; 0 = only at the end."""
    keep: int = 2
    """How many checkpoints are kept, the newest; 0 = all."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are kept for good; 0 = none."""
    keep_best: int = 0
    """So many with the best `best_metric` are kept besides; 0 = none."""
    best_metric: str = "loss"
    """What makes a checkpoint the best, "loss" or "masked_accuracy": its mean since the checkpoint before."""
    asynchronous: bool = True
    """Training waits only while its state is copied, and goes on while it is written; the copy takes 12 bytes of host
    memory for each parameter, shared out over the processes. false = training waits for the disk."""
    probe: bool = True
    """The logits of a few fixed inputs are stored beside the weights, and after loading they must come out again."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    every: int = 0
    """Updates between two exports into <run>/hub/step-XXXXXXXX; 0 = only at the end."""
    dtype: str = "fp32"
    """Number format of the exported weights, "fp32" or "bf16"."""
    adapters: bool = True
    """Each language's adapters also stand in a file of their own, xmod only."""
    shard_gb: float = 5.0
    """GB of tensors in a file; more files let more processes write at once."""
    push_to: str = ""
    """Repository on the Hub that every export is uploaded to, as "org/name", behind the training; "" = none.
    The token is the environment's HF_TOKEN; an upload that fails is told and never stops the run."""
    push_private: bool = True
    """A repository that the first upload makes is private."""
    push_hours: float = 2.0
    """An upload that is not done by then is given up."""


@dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    max_skipped: int = 20
    """The run stops, with a checkpoint, once so many of the last `window` updates were skipped as faulty."""
    window: int = 1000
    """Updates over which skipped ones are counted."""
    spike_factor: float = 0.0
    """A loss above so many times the mean of the last `spike_window` is a fault too; 0 = only what is not finite."""
    spike_window: int = 100
    """Updates whose mean a loss is compared with; the rule begins once so many are done."""
    keep: int = 8
    """Skipped updates whose batches are kept in <run>/faults for `xlscale replay`, the newest."""
    max_bad_documents: int = 0
    """Tokenising ends once more documents than this cannot be used (damaged shard, no UTF-8, too long)."""
    max_replaced: int = 1000
    """The run stops, with a checkpoint, once more samples than this were replaced because their chunk is damaged."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    wandb: str = "offline"
    """"offline" writes wandb files into the run folder, "online" sends them, "disabled" does neither."""
    wandb_project: str = "xlscale"
    """Project of the run in wandb."""
    every: int = 1
    """Updates between two log lines; metrics.jsonl has every update all the same."""


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    training: TrainingConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig
    data: DataConfig
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Keys of the engine's own JSON, nested as there, laid over what is made from the sections; see README."""

    @property
    def run_dir(self) -> Path:
        """The run's folder, <run.dir>/<run.name>."""
        return Path(self.run.dir) / self.run.name
