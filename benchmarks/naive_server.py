"""The naive server that benchmarks/serving.py measures beside ours: transformers in a plain FastAPI handler.

    python -m benchmarks.naive_server MODEL PORT

As OpenRLHF's serve_rm is written: one request after the other, each one padded batch of its own.
"""

import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def make(folder: str) -> FastAPI:
    """The application, with the model loaded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").to(device).eval()
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict:
        return {}

    @app.post("/get_reward")
    async def get_reward(request: Request) -> dict:
        texts = (await request.json())["query"]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
        with torch.inference_mode():
            rewards = model(**batch).logits.float().squeeze(-1).tolist()
        return {"rewards": rewards, "scores": rewards, "extra_logs": {}}

    return app


if __name__ == "__main__":
    uvicorn.run(make(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
