"""A server of completions for one user on this machine, in the form of OpenAI's API, over fastgpt.stream.

    python examples/serve.py run --port 8000
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def ", "max_tokens": 40}'

It answers one request after another, and only this machine. Not for the internet: it knows no users and no limits.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import fastgpt
from fastgpt.cli.text import load
from fastgpt.generation.decoder import Decoder


class Completions(BaseHTTPRequestHandler):
    decoder: Decoder
    encoding = None
    name = ""

    def do_POST(self) -> None:
        try:
            if self.path != "/v1/completions":
                raise ValueError(f"there is no {self.path}, only /v1/completions")
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            steps = self.steps(asked)
        except (TypeError, ValueError, KeyError) as error:
            return self.answer(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
        if not asked.get("stream"):
            found = list(steps)
            text, reason = "".join(step.texts[0] for step in found), found[-1].reasons[0]
            return self.answer(200, self.piece(text, reason))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for step in steps:
            self.wfile.write(f"data: {json.dumps(self.piece(step.texts[0], step.reasons[0]))}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def steps(self, asked: dict):
        stop = asked.get("stop") or []
        return fastgpt.stream(
            self.decoder,
            [self.encoding.encode(asked["prompt"], disallowed_special=()) or [self.encoding.eot_token]],
            asked.get("max_tokens", 16),
            temperature=asked.get("temperature", 1.0),
            top_p=asked.get("top_p"),
            seed=asked.get("seed"),
            stop_strings=[stop] if isinstance(stop, str) else stop,
            encoding=self.encoding,
            overflow="slide",
        )

    def piece(self, text: str, reason: str | None) -> dict:
        reason = None if reason is None else "length" if reason == "length" else "stop"
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        return {"id": "fastgpt", "object": "text_completion", "created": 0, "model": self.name, "choices": [choice]}

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a folder or file of any family, or gpt2")
    parser.add_argument("--encoding", help="where the checkpoint does not tell it")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    options = parser.parse_args()
    model, Completions.encoding = load(options.checkpoint, options.encoding)
    Completions.decoder, Completions.name = Decoder(model, tokens=10_000), options.checkpoint
    with HTTPServer(("127.0.0.1", options.port), Completions) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
