"""An object store on loopback."""

import contextlib
import os
import socket
import struct

from moto.server import ThreadedMotoServer


class ObjectStore:
    """A real S3 protocol server with one bucket; what is in it outlives the server's absence.

    The next ``resets`` connections are reset once they have asked for something.
    """

    url = "s3://teachers"
    resets = 0

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
        self._connections: list[socket.socket] = []
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()
        listener = self._server._server
        assert listener is not None
        accept = listener.get_request

        def remember() -> tuple[socket.socket, object]:
            connection, address = accept()
            if self.resets:
                self.resets -= 1
                connection.recv(1 << 16)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
                raise ConnectionResetError  # which a server passes over
            self._connections.append(connection)
            return connection, address

        listener.get_request = remember  # type: ignore[method-assign]

    def go_away(self) -> None:
        """Refuse connections, and cut those that there are: their threads would go on to answer."""
        self._server.stop()
        for connection in self._connections:
            with contextlib.suppress(OSError):  # closed before
                connection.shutdown(socket.SHUT_RDWR)
