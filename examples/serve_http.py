"""Serve an accelerated model over HTTP with nothing but the standard library.

    python examples/serve_http.py --port 8000
    curl -d '{"inputs": [[0.1, 0.2, ...64 numbers]]}' http://127.0.0.1:8000/predict
    python examples/serve_http.py --self-test     # serves itself a few requests on loopback and stops

A connection has a thread, WORKERS of them may compute at once: kernels release the GIL, so they run side by
side, and the packed weights are read-only and shared.
"""

import argparse
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from torch import nn

import pared

FEATURES, CLASSES, WORKERS, MAX_ROWS, MAX_BYTES = 64, 10, 2, 256, 1 << 20


def make_model() -> nn.Module:
    """Stands for yours; `pared.load("model.pared", Net)` would serve as well."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(FEATURES, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, CLASSES)
    ).eval()
    pared.prune(model, 0.9)
    return pared.accelerate(model, torch.randn(16, FEATURES))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], model: nn.Module) -> None:
        super().__init__(address, Handler)
        self.model = model
        self.workers = threading.BoundedSemaphore(WORKERS)

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        with self.workers, torch.inference_mode():
            return self.model(inputs)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a byte from the client

    def do_POST(self) -> None:
        if self.path != "/predict":
            return self.answer(404, {"error": "only POST /predict is here"})
        try:
            inputs = self.read_inputs()
        except ValueError as e:
            self.close_connection = True  # what is left of the body is not read
            return self.answer(400, {"error": str(e)})
        self.answer(200, {"outputs": self.server.predict(inputs).tolist()})

    def read_inputs(self) -> torch.Tensor:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BYTES:
            raise ValueError(f"Content-Length: expected at most {MAX_BYTES}, got {length or 'none'}")
        body = json.loads(self.rfile.read(int(length)))
        rows = body.get("inputs") if isinstance(body, dict) else None
        if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ROWS:
            raise ValueError(f"inputs: expected 1 to {MAX_ROWS} rows")
        try:
            x = torch.tensor(rows, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            x = torch.empty(0)
        if x.shape != (len(rows), FEATURES) or not bool(torch.isfinite(x).all()):
            raise ValueError(f"inputs: expected rows of {FEATURES} finite numbers")
        return x

    def answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def post(url: str, content: object) -> tuple[int, dict]:
    request = urllib.request.Request(url, json.dumps(content).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as e:
        with e:
            return e.code, json.load(e)


def self_test(server: Server) -> None:
    url = f"http://127.0.0.1:{server.server_port}/predict"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        batches = [torch.randn(1 + i % 5, FEATURES) for i in range(40)]
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda x: post(url, {"inputs": x.tolist()}), batches))
        with torch.inference_mode():
            for x, (status, answer) in zip(batches, answers, strict=True):
                assert status == 200, answer
                torch.testing.assert_close(
                    torch.tensor(answer["outputs"]), server.model(x), rtol=1e-5, atol=1e-5
                )
        for wrong in ({}, {"inputs": []}, {"inputs": [[1.0]]}, {"inputs": [["a"] * FEATURES]}, [1]):
            status, answer = post(url, wrong)
            assert status == 400, answer
            print(f"refused: {answer['error']}")
        print(f"{len(answers)} requests from 4 clients answered correctly")
    finally:
        server.shutdown()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    # Workers run beside each other: one core for each instead of all cores for one.
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))
    with Server(("127.0.0.1", 0 if args.self_test else args.port), make_model()) as server:
        if args.self_test:
            self_test(server)
        else:
            print(f"http://127.0.0.1:{server.server_port}/predict")
            server.serve_forever()


if __name__ == "__main__":
    main()
