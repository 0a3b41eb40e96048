"""An object store on loopback."""

import os

from moto.server import ThreadedMotoServer


class ObjectStore:
    """A real S3 protocol server on loopback with one bucket; what is in it outlives the server's absence."""

    url = "s3://teachers"

    def __init__(self) -> None:
        self._port = 0
        self.come_back()
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{self._port}",
            AWS_ALLOW_HTTP="true",
            AWS_ACCESS_KEY_ID="test",
            AWS_SECRET_ACCESS_KEY="test",
            AWS_REGION="us-east-1",
        )
        import boto3

        boto3.client("s3").create_bucket(Bucket="teachers")

    def come_back(self) -> None:
        """Listen, always at the same port."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()

    def go_away(self) -> None:
        """Refuse connections from now on."""
        self._server.stop()
