import os
import platform

from flask import Flask, jsonify

app = Flask(__name__)


@app.get("/")
def index():
    return f"Hello from machine {os.environ.get('DUNLIN_MACHINE_ID', 'somewhere')}, Python {platform.python_version()}\n"


@app.get("/health")
def health():
    return jsonify(ok=True)
