"""A relay as one would write it with aiohttp: its client on one side, its server on the other, chunk by chunk.

Owns: the yardstick of bench.peer_get, run as a process of its own (`python -m bench.relay --to HOST:PORT`). Does not own: any
measurement.

Invariant: what is asked of it is asked of the other server with the same target, and comes back with its status and length.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal

import aiohttp
import uvloop
from aiohttp.client_exceptions import ClientConnectionError
from aiohttp.web import Application, AppRunner, Request, StreamResponse
from yarl import URL

_CHUNK_BYTES = 256 * 1024


async def serve(to: str) -> None:
    """Until SIGTERM."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with aiohttp.ClientSession(auto_decompress=False) as session:

        async def relay(request: Request) -> StreamResponse:
            async with session.get(URL(f"http://{to}{request.raw_path}", encoded=True)) as response:
                answer = StreamResponse(
                    status=response.status, headers={"Content-Length": str(response.content_length)}
                )
                await answer.prepare(request)
                # Whoever measures ends in the middle of an answer.
                with contextlib.suppress(ClientConnectionError, ConnectionError):
                    async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                        await answer.write(chunk)
                    await answer.write_eof()
                return answer

        app = Application()
        app.router.add_get("/{target:.*}", relay)
        runner = AppRunner(app, access_log=None)
        await runner.setup()
        assert runner.server is not None
        server = await loop.create_server(runner.server, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        print(f"relay ready {host}:{port}", flush=True)
        await stop.wait()
        server.close()
        await runner.cleanup()


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m bench.relay", description=__doc__)
    options.add_argument("--to", required=True, metavar="HOST:PORT")
    uvloop.run(serve(options.parse_args().to))
