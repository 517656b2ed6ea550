"""A server that answers as Google Cloud Storage does: python gcs.py PORT.

gcp-storage-emulator, with what tensorstore needs and it has not: an object's
generation beside its bytes, and writes that count only if that is still as
said. It has one bucket, `bucket`.
"""

from http import HTTPStatus
import sys
import threading

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_download, _insert = objects.download, objects.insert
_lock = threading.Lock()


def _generation(request, storage, name):
  try:
    found = storage.get_file_obj(request.params['bucket_name'], name)
  except NotFound:
    return '0'
  return found['generation']


def _with_generation(request, response, storage, *args, **kwargs):
  with _lock:
    now = _generation(request, storage, request.params['object_id'])
    if request.query.get('ifGenerationNotMatch') == [now]:
      response.status = HTTPStatus.NOT_MODIFIED
      return
    if now != '0':
      response['x-goog-generation'] = now
    _download(request, response, storage, *args, **kwargs)


def _if_as_said(request, response, storage, *args, **kwargs):
  with _lock:
    said = request.query.get('ifGenerationMatch')
    if said:
      # tensorstore's uploads have the name in the query, gcsfs's in a part.
      asked = request.query.get('name') or [request.data['meta']['name']]
      if said != [_generation(request, storage, asked[0])]:
        response.status = HTTPStatus.PRECONDITION_FAILED
        return
    _insert(request, response, storage, *args, **kwargs)


objects.download, objects.insert = _with_generation, _if_as_said

if __name__ == '__main__':
  # Its table of functions is made when it is imported.
  from gcp_storage_emulator.server import create_server

  server = create_server(
    'localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket'
  )
  server.start()
  print('ready', flush=True)
  threading.Event().wait()
