"""A stand-in of the Hugging Face Hub on this machine: repositories, large files, commits.

It speaks as much of the protocol as `huggingface_hub` uses to create a repository, to commit to it
and to download from it, and it can die in the middle.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = 'a-token-of-this-test'
LARGE = ('.safetensors', '.gguf', '.png')


class Hub(ThreadingHTTPServer):
    "Repositories by name, `owner/name` for models and `datasets/owner/name` for datasets."

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repos = {}  # by name: files by path
        self.private = {}
        self.commits = []  # repository, and the paths that were named
        self.blobs = {}  # large files by checksum
        self.uploads = []  # checksums of the uploads that arrived whole
        self.refuse = None  # a status for every request that would write
        self.dies_after = None  # so many uploads
        self.is_dead = False
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self):
        return f'http://127.0.0.1:{self.server_address[1]}'

    def add(self, repo, folder):
        "Put a folder into a repository."
        files = [path for path in folder.rglob('*') if path.is_file()]
        self.repos[repo] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    "Routes a request by its path."

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        "Say nothing on standard error."

    def answer(self, body=b'', status=200, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def read_body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_any(self):
        hub = self.server
        body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        if hub.is_dead:
            self.close_connection = True
            return
        if self.command in ('POST', 'PUT') and not path.startswith('/lfs/'):
            if self.headers.get('Authorization') != f'Bearer {TOKEN}':
                return self.answer(dict(error='Invalid credentials'), 401)
            if hub.refuse:
                return self.answer(dict(error='not yours'), hub.refuse)
        for pattern, name in ROUTES.items():
            method, _, route = pattern.partition(' ')
            found = re.fullmatch(route, path)
            if found and self.command in method.split('|'):
                return getattr(self, name)(body, *found.groups())
        return self.answer(dict(error=f'{self.command} {path} is not here'), 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body):
        wanted = json.loads(body)
        prefix = 'datasets/' if wanted.get('type') == 'dataset' else ''
        name = f'{prefix}{wanted.get("organization") or "me"}/{wanted["name"]}'
        if name in self.server.repos:
            return self.answer(dict(error='exists', url=f'{self.server.address}/{name}'), 409)
        self.server.repos[name] = {}
        self.server.private[name] = wanted.get('visibility') == 'private' or wanted.get('private')
        return self.answer(dict(url=f'{self.server.address}/{name}'))

    def validate(self, body):
        self.answer(dict(errors=[], warnings=[]))

    def preupload(self, body, kind, repo):
        there = self.server.repos[repo if kind == 'models' else f'datasets/{repo}']
        files = []
        for file in json.loads(body)['files']:
            mode = 'lfs' if file['path'].endswith(LARGE) else 'regular'
            entry = dict(path=file['path'], uploadMode=mode, shouldIgnore=False)
            if file['path'] in there:
                entry['oid'] = git_id(there[file['path']], mode)
            files.append(entry)
        self.answer(dict(files=files))

    def batch(self, body, repo):
        objects = []
        for wanted in json.loads(body)['objects']:
            entry = dict(oid=wanted['oid'], size=wanted['size'])
            if wanted['oid'] not in self.server.blobs:
                href = f'{self.server.address}/lfs/{wanted["oid"]}'
                entry['actions'] = dict(upload=dict(href=href))
            objects.append(entry)
        self.answer(dict(transfer='basic', objects=objects))

    def upload(self, body, oid):
        hub = self.server
        with hub.lock:
            self._upload(hub, body, oid)

    def _upload(self, hub, body, oid):
        if hub.dies_after is not None and len(hub.uploads) >= hub.dies_after:
            hub.is_dead = True
            self.close_connection = True
            return
        assert hashlib.sha256(body).hexdigest() == oid
        hub.blobs[oid] = body
        hub.uploads.append(oid)
        self.answer()

    def commit(self, body, kind, repo):
        hub = self.server
        name = repo if kind == 'models' else f'datasets/{repo}'
        paths = []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry['value']
            if entry['key'] == 'file':
                hub.repos[name][value['path']] = base64.b64decode(value['content'])
            elif entry['key'] == 'lfsFile':
                hub.repos[name][value['path']] = hub.blobs[value['oid']]
            else:
                continue
            paths.append(value['path'])
        hub.commits.append((name, sorted(paths)))
        oid = f'{len(hub.commits):040x}'
        url = f'{hub.address}/{name}/commit/{oid}'
        self.answer(dict(success=True, commitUrl=url, commitOid=oid, hookOutput=''))

    def info(self, body, kind, repo):
        name = repo if kind == 'models' else f'datasets/{repo}'
        files = self.server.repos.get(name)
        if files is None:
            return self.answer(dict(error='no'), 404, X_Error_Code='RepoNotFound')
        siblings = [dict(rfilename=path) for path in files]
        return self.answer(dict(id=repo, sha=SHA, siblings=siblings, tags=[], private=False))

    def tree(self, body, kind, repo, folder):
        name = repo if kind == 'models' else f'datasets/{repo}'
        files = self.server.repos.get(name)
        if files is None:
            return self.answer(dict(error='no'), 404, X_Error_Code='RepoNotFound')
        found = [p for p in files if p.startswith((folder or '').strip('/'))]
        if not found:
            return self.answer(dict(error='no'), 404, X_Error_Code='EntryNotFound')
        rows = [dict(type='file', path=p, size=len(files[p]), oid=git_id(files[p])) for p in found]
        return self.answer(rows)

    def resolve(self, body, repo, path):
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer(status=404, X_Error_Code='RepoNotFound')
        if path not in files:
            return self.answer(status=404, X_Error_Code='EntryNotFound', X_Repo_Commit=SHA)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        return self.answer(files[path], ETag=etag, X_Repo_Commit=SHA)


SHA = '5' * 40
ROUTES = {
    'POST /api/repos/create': 'create',
    'POST /api/validate-yaml': 'validate',
    r'POST /api/(models|datasets)/(.+)/preupload/main': 'preupload',
    r'POST /(?:datasets/)?(.+)\.git/info/lfs/objects/batch': 'batch',
    r'PUT /lfs/(\w+)': 'upload',
    r'POST /api/(models|datasets)/(.+)/commit/main': 'commit',
    r'GET /api/(models|datasets)/([^/]+/[^/]+)(?:/revision/\w+)?': 'info',
    r'GET /api/(models|datasets)/([^/]+/[^/]+)/tree/\w+(/.*)?': 'tree',
    r'GET|HEAD /(.+)/resolve/\w+/(.+)': 'resolve',
}


def git_id(content, mode='regular'):
    "How git names a file: by its content, or by its checksum if it is a large one."
    if mode == 'lfs':
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()
