"""sentence-transformers' `CrossEncoder` with a head for each objective, trained on lists in mini-batches."""

import tempfile

import tiny
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from transformers import BertConfig, BertForSequenceClassification

from mopl.integrations.sentence_transformers import ListLoss

folder = tempfile.mkdtemp()  # a random BERT; take the name of a model in its place
config = BertConfig(
    vocab_size=len(tiny.WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=64, pad_token_id=0, initializer_range=0.1,
)  # fmt: skip
BertForSequenceClassification(config).save_pretrained(folder)
tiny.tokenizer().save_pretrained(folder)

lists = tiny.lists()
data = Dataset.from_dict({
    "query": [row["prompt"] for row in lists],
    "documents": [row["responses"] for row in lists],
    "labels": [list(row["labels"].values()) for row in lists],  # a list for each objective
})  # fmt: skip
model = CrossEncoder(folder, num_labels=2, device="cpu")
loss = ListLoss(model, "plackett_luce", objectives=["polite", "brief"], mini_batch_size=4)
args = CrossEncoderTrainingArguments(
    folder, max_steps=30, per_device_train_batch_size=6, learning_rate=3e-3, report_to="none", save_strategy="no",
    use_cpu=True, disable_tqdm=True, logging_steps=10,
)  # fmt: skip
CrossEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss).train()

for column, name in enumerate(loss.objectives):
    right = total = 0
    for row in lists:
        scores = model.predict([(row["prompt"], text) for text in row["responses"]])[:, column]
        labels = row["labels"][name]
        pairs = [(i, k) for i in range(3) for k in range(3) if labels[i] > labels[k]]
        right, total = right + sum(scores[i] > scores[k] for i, k in pairs), total + len(pairs)
    print(f"accuracy of {name}: {right / total:.0%}")
