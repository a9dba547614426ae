//! The app that most tests deploy: Python's standard library only, so that its image is built in a moment.

/// What it does is told by its environment: `RELEASE`, `BEHAVE`, `BIND`.
pub const APP_PY: &str = r#"
import http.server, os, signal, sys, time

release = os.environ.get("RELEASE", "1")
behave = os.environ.get("BEHAVE", "good")
if behave == "exits":
    print("cannot find the database")
    sys.exit(3)
if behave == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if behave == "eats":
    hoard = []
    while True:
        hoard.append(bytearray(8 << 20))

class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        status, body = 200, "release " + release
        if self.path == "/machine":
            body = os.environ["DUNLIN_MACHINE_ID"]
        elif self.path.startswith("/env/"):
            body = os.environ.get(self.path[5:], "(unset)")
        elif self.path.startswith("/slow/"):
            time.sleep(float(self.path[6:]))
        elif self.path == "/headers":
            body = "".join(f"{name}: {value}\n" for name, value in self.headers.items())
        elif self.path == "/health" and behave == "sick":
            status, body = 500, "the cache is cold"
        elif self.path == "/print":
            print("printed", flush=True)
        elif self.path == "/die":
            os._exit(9)
        body = body.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128

address = (os.environ.get("BIND", "0.0.0.0"), int(os.environ.get("LISTEN", "8080")))
print("release", release, "listens on", address, flush=True)
Server(address, App).serve_forever()
"#;

pub const DOCKERFILE: &str = "FROM python:3.11-slim\nCOPY app.py /app.py\nEXPOSE 8080\nCMD [\"python3\", \"-u\", \"/app.py\"]\n";

/// The source of the app.
pub const PYTHON: &[(&str, &str)] = &[("app.py", APP_PY), ("Dockerfile", DOCKERFILE)];
