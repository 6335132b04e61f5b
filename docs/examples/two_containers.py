"""Two containers of one task: a volume and localhost in common, one waits for the other.

    python docs/examples/two_containers.py IMAGE [STATE-DIR]

IMAGE needs a shell, nc and wget (busybox has them).
"""

import sys

import trio

import sandbox


async def main(image: str, state_dir: str) -> None:
    serve = "while true; do echo -e 'HTTP/1.0 200 OK\\n' | cat - /data/page | nc -l -p 80; done"
    async with sandbox.open_sandbox(state_dir=state_dir) as sb:
        task = await sb.run_task(
            cpu=256,
            memory=512,
            volumes=["data"],
            containers=[
                {
                    "name": "writer",
                    "image": image,
                    "essential": False,
                    "command": ["sh", "-c", "echo written by one, served by another >/data/page"],
                    "mountPoints": [{"sourceVolume": "data", "containerPath": "/data"}],
                },
                {
                    "name": "web",
                    "image": image,
                    "essential": False,
                    "command": ["sh", "-c", serve],
                    "mountPoints": [
                        {"sourceVolume": "data", "containerPath": "/data", "readOnly": True}
                    ],
                    "dependsOn": [{"containerName": "writer", "condition": "SUCCESS"}],
                    "stopTimeout": 2,
                },
                {
                    "name": "client",
                    "image": image,
                    "command": ["sh", "-c", "sleep 0.2; wget -qO- http://localhost/"],
                    "dependsOn": [{"containerName": "web", "condition": "START"}],
                },
            ],
        )
        await task.wait()
        async for record in task.logs(container="client"):
            print(f"{record.container}: {record.data.decode()}", end="")
        print(f"client ended with {task.exit_code}: {task.stopped_reason}")


trio.run(main, sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "/var/lib/sandbox")
