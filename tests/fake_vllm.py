"""A stand-in for a vLLM server: the same protocol over a tiny model of Transformers, and every fault on demand.

    with FakeVLLM(model) as server:
        server.faults["/health"] = ["503"]      # what the next calls of a path meet, in order
        server.break_after = 3                  # streams break off after so many tokens

It runs in a thread of its own and knows nothing of the package.
"""

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections import defaultdict

import numpy as np
import torch
from transformers import AutoModelForCausalLM

MAX_LOGPROBS = 64
LOADING = threading.Lock()
"""Two servers in one process: Transformers loads one model at a time."""


class FakeVLLM:
    """One server.

    Attributes:
        faults: by path, what its next calls meet: a status such as "503", "hang", "garbage", "close".
        break_after: where set, streams break off after so many tokens; "error" sends an error event, "abort" gives up.
        how_it_breaks: "close", "error", "abort" or "hang".
        breaks: how many streams break; None for all.
        calls: paths and bodies, in order.
        generated: tokens sampled for streams.
        forgetful: whether it says that it took new weights, and does not.
        sends_done: whether streams say that there are no more events; else their connection breaks instead.
        odd: by path, answers that are no vLLM's.
        scores_ids: whether it scores ids that are named, as servers on GPUs do.
        read: tokens of the prompts that it scored, without the small one that asks what it has.
        name: of the folder that it was started with.
        keys: what was sent as its key, None where nothing was.
    """

    def __init__(
        self, model, *, max_model_len=512, max_logprobs=MAX_LOGPROBS, key=None, dev_mode=True, token_api=True, lag=0.0
    ):
        self.base, self.model, self.max_model_len, self.max_logprobs = model, model, max_model_len, max_logprobs
        self.key, self.dev_mode, self.token_api, self.lag = key, dev_mode, token_api, lag
        self.faults = defaultdict(list)
        self.break_after, self.how_it_breaks, self.breaks = None, "close", None
        self.version, self.calls, self.generated, self.open = None, [], 0, 0
        self.adapters, self.reader_of, self.paused, self.forgetful = {}, {}, False, False
        self.sends_done, self.odd = True, {}
        self.scores_ids, self.read, self.keys, self.name = False, 0, set(), "student"
        self.port = 0
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def start(self):
        """Listen, on the same port as before if there was one."""
        ready = threading.Event()
        self.loop = asyncio.new_event_loop()
        tasks = set()

        async def serve():
            # Server.close of asyncio leaks a connection that was accepted in the same turn of the loop
            listener = socket.create_server(("127.0.0.1", self.port))
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            self.stopping = asyncio.Event()
            self.loop.add_reader(listener, accept, listener)
            ready.set()
            await self.stopping.wait()
            self.loop.remove_reader(listener)
            listener.close()
            await asyncio.sleep(0)  # a task that is cancelled before its first step would leave its socket open
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        def accept(listener):
            with contextlib.suppress(BlockingIOError, ConnectionError):
                tasks.add(self.loop.create_task(answer(listener.accept()[0])))

        async def answer(connection):
            reader, writer = await asyncio.open_connection(sock=connection)
            self.reader_of[writer] = reader
            try:
                await self._connection(reader, writer)
            finally:
                del self.reader_of[writer]
                if self.stopping.is_set():
                    writer.transport.abort()  # with data left to send, close would wait

        def run():
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(serve())
            self.loop.run_until_complete(asyncio.sleep(0))  # the transports close their sockets
            self.loop.close()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert ready.wait(10)

    def kill(self):
        """As kill -9: connections break, weights and versions are lost."""
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stopping.set)
            self.thread.join(10)
        self.model, self.version, self.adapters, self.paused = self.base, None, {}, False

    def wait_until_quiet(self):
        """Until it has noticed that the other side of every stream is gone."""
        for _ in range(200):
            if not self.open:
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.open} streams still run")

    def bodies(self, path):
        """What was sent to a path."""
        return [body for called, body in self.calls if called == path]

    # ------------------------------------------------------------------ HTTP

    async def _connection(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                line, *rest = head.split("\r\n")
                headers = {
                    name.strip().lower(): value.strip() for name, _, value in (each.partition(":") for each in rest)
                }
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                path = line.split(" ")[1]
                body = json.loads(content) if content else None
                self.calls.append((path, body))
                if not await self._answer(writer, path, body, headers):
                    break
        writer.close()

    async def _answer(self, writer, path, body, headers):
        """Whether the connection goes on."""
        if self.faults[path]:
            fault = self.faults[path].pop(0)
            if fault == "hang":
                await asyncio.sleep(3600)
            if fault == "close":
                return False
            if fault == "garbage":
                return await self._send(writer, 200, b"<html>no vLLM here</html>")
            if fault is not None:
                return await self._json(writer, int(fault), {"error": {"message": f"made to fail with {fault}"}})
        self.keys.add(headers.get("authorization"))
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return await self._json(writer, 401, {"error": f"Unauthorized: {headers.get('authorization')}"})
        if path in self.odd:
            return await self._json(writer, 200, self.odd[path])
        if path == "/health":
            return await self._send(writer, 200, b"")
        if path == "/v1/models":
            known = {"id": self.name, "max_model_len": self.max_model_len}
            return await self._json(writer, 200, {"data": [known, *({"id": name} for name in self.adapters)]})
        if path == "/inference/v1/generate" and self.token_api:
            return await self._generate(writer, body)
        if self.dev_mode:
            if path == "/collective_rpc" and self.forgetful:
                return await self._json(writer, 200, {"results": [None]})
            if path == "/collective_rpc":
                with LOADING:
                    self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
                return await self._json(writer, 200, {"results": [None]})
            if path == "/reset_prefix_cache":
                return await self._json(writer, 200, {"success": not self.open})
            if path in ("/pause?mode=abort", "/resume"):
                self.paused = path != "/resume"
                while self.paused and self.open:
                    await asyncio.sleep(0.01)
                return await self._json(writer, 200, {"status": "paused" if self.paused else "resumed"})
            if path == "/update_weight_version":
                self.version = body["new_version"]
                return await self._json(writer, 200, {"success": True})
            if path == "/weight_info":
                return await self._json(writer, 200, {"weight_version": self.version})
        return await self._json(writer, 404, {"detail": "Not Found"})

    async def _json(self, writer, status, value):
        return await self._send(writer, status, json.dumps(value).encode())

    async def _send(self, writer, status, content):
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        return True

    # ------------------------------------------------------------------ tokens

    async def _generate(self, writer, body):
        how = body["sampling_params"]
        if (how.get("logprobs") or 0) > self.max_logprobs:
            said = f"Requested sample logprobs of {how['logprobs']}, which is greater than max allowed: {self.max_logprobs}"
            return await self._json(writer, 400, {"error": {"message": said}})
        if len(body["token_ids"]) + how["max_tokens"] > self.max_model_len:
            return await self._json(
                writer, 400, {"error": {"message": "This model's maximum context length is too small"}}
            )
        if (how.get("prompt_logprobs") or 0) > self.max_logprobs:
            said = f"Requested prompt logprobs of {how['prompt_logprobs']}, which is greater than max allowed: {self.max_logprobs}"
            return await self._json(writer, 400, {"error": {"message": said}})
        if how.get("prompt_logprob_token_ids") is not None and not self.scores_ids:
            said = "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)."
            return await self._json(writer, 400, {"error": {"message": said}})
        if how.get("prompt_logprobs") is not None:
            self.read += len(body["token_ids"]) * (body["token_ids"] != list(range(8)))
            return await self._json(writer, 200, self._prompt_scores(body["token_ids"], how))
        if not body.get("stream"):
            tokens, content, reason = [], [], None
            for token, entry, reason in self._tokens(body):  # noqa: B007 - the last one counts
                tokens.append(token)
                content.append(entry)
            answer = self._event(tokens, content, reason, how)
            return await self._json(writer, 200, answer)
        breaks = self.break_after is not None and (self.breaks is None or self.breaks > 0)
        if breaks and self.breaks is not None:
            self.breaks -= 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        tokens, content, sent = [], [], 0
        self.open += 1
        try:
            for number, (token, entry, reason) in enumerate(self._tokens(body), start=1):
                if breaks and number > self.break_after:
                    if self.how_it_breaks == "hang":
                        await asyncio.sleep(3600)
                    if self.how_it_breaks == "error":
                        await self._chunk(writer, {"error": {"message": "EngineCore died", "code": 500}})
                    if self.how_it_breaks == "abort":
                        await self._chunk(writer, self._event([token], [entry], "abort", how))
                    return False
                self.generated += 1
                tokens.append(token)
                content.append(entry)
                if number == 1 or reason is not None or len(tokens) >= how["stream_interval"]:
                    await self._chunk(writer, self._event(tokens, content, reason, how))
                    sent, tokens, content = sent + len(tokens), [], []
                await asyncio.sleep(self.lag)
                if writer.is_closing() or self.reader_of[writer].at_eof() or self.paused:
                    return False
            if not self.sends_done:
                return False
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            await writer.drain()
            return True
        finally:
            self.open -= 1

    async def _chunk(self, writer, event):
        data = f"data: {json.dumps(event)}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await writer.drain()

    def _event(self, tokens, content, reason, how):
        log_probs = {"content": content} if how.get("logprobs") is not None else None
        choice = {"index": 0, "token_ids": tokens, "finish_reason": reason, "logprobs": log_probs}
        if reason is not None:
            choice["weight_versions"] = [{"version": self.version or "default", "start": 0, "end": 1}]
        return {"request_id": "x", "choices": [choice]}

    @torch.no_grad()
    def _prompt_scores(self, ids, how):
        """The likeliest ids at each place and the one that stands there, and the named ones as a .npy file in base64."""
        log_probs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        entries = [None]
        for at, token in zip(log_probs[:-1], ids[1:], strict=True):
            best = at.topk(min(how["prompt_logprobs"], len(at))).indices.tolist()
            ranked = {str(each): {"logprob": float(at[each]), "rank": rank} for rank, each in enumerate(best, start=1)}
            own = {str(token): {"logprob": float(at[token]), "rank": int((at > at[token]).sum()) + 1}}
            entries.append({**own, **ranked})
        answer = {
            "request_id": "x",
            "choices": [{"token_ids": [0], "finish_reason": "length", "weight_versions": [{"version": self.version}]}],
            "prompt_logprobs": entries,
        }
        if how.get("prompt_logprob_token_ids") is not None:
            named = torch.tensor(how["prompt_logprob_token_ids"])
            scores = log_probs[how["prompt_logprob_start"] : -1].gather(-1, named)
            with io.BytesIO() as file:
                np.save(file, scores.numpy(), allow_pickle=False)
                answer["prompt_token_id_logprobs"] = base64.b64encode(file.getvalue()).decode()
        return answer

    @torch.no_grad()
    def _tokens(self, body):
        how, ids = body["sampling_params"], list(body["token_ids"])
        generator = torch.Generator().manual_seed(how.get("seed", 0) % 2**63)
        model = self.adapters.get(body.get("model"), self.model)
        for number in range(how["max_tokens"]):
            logits = model(torch.tensor([ids])).logits[0, -1].float()
            log_probs = logits.log_softmax(-1)
            for token, bias in (how.get("logit_bias") or {}).items():
                logits[int(token)] += bias
            if how["temperature"] == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / how["temperature"]).softmax(-1), 1, generator=generator))
            ids.append(token)
            entry = {"token": "", "token_id": token, "logprob": float(log_probs[token])}
            wanted = how.get("logprobs") or 0
            best = log_probs.topk(min(wanted, len(log_probs))).indices.tolist()
            if wanted and token not in best:
                best[-1] = token  # as vLLM does: the sampled token is one of them
            entry["top_logprobs"] = [{"token_id": each, "logprob": float(log_probs[each])} for each in best]
            ended = token in how["stop_token_ids"]
            last = number + 1 == how["max_tokens"]
            yield token, entry, "stop" if ended else "length" if last else None
            if ended:
                return
