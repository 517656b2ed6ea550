"""Headless Chromium over its debugging pipe: the standard library is enough."""

import base64
import itertools
import json
import os
import shutil
import signal
import tempfile
import time

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
PATH = next(filter(None, map(shutil.which, _NAMES)), None)
_FLAGS = (
  *('--headless', '--remote-debugging-pipe', '--no-sandbox', '--disable-gpu'),
  *('--disable-dev-shm-usage', '--no-first-run', '--disable-extensions'),
  # The browser asks for nothing of its own.
  *('--disable-background-networking', '--disable-component-update'),
  *('--disable-sync', '--disable-quic'),
)
_TIMEOUT = 60.0


class Browser:
  """One page of a Chromium. Use as a context manager.

  Attributes:
    events: all that the page reported since it was opened.
  """

  def __enter__(self):
    self._folder = tempfile.TemporaryDirectory(
      prefix='chromium-', ignore_cleanup_errors=True
    )
    theirs_in, self._out = os.pipe()
    self._in, theirs_out = os.pipe()
    # It reads from file descriptor 3 and writes to 4.
    self._process = os.posix_spawn(
      PATH,
      [PATH, *_FLAGS, f'--user-data-dir={self._folder.name}', 'about:blank'],
      {**os.environ, 'HOME': self._folder.name},
      file_actions=[
        (os.POSIX_SPAWN_DUP2, theirs_in, 3),
        (os.POSIX_SPAWN_DUP2, theirs_out, 4),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
      ],
      setpgroup=0,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    os.set_blocking(self._in, False)
    self._numbers, self._buffer, self.events = itertools.count(1), b'', []
    self._session = None
    pages = self.call('Target.getTargets')['targetInfos']
    page = next(t['targetId'] for t in pages if t['type'] == 'page')
    self._session = self.call(
      'Target.attachToTarget', targetId=page, flatten=True
    )['sessionId']
    for domain in ('Page', 'Log', 'Runtime', 'Network'):
      self.call(f'{domain}.enable')
    return self

  def __exit__(self, *_):
    os.killpg(self._process, signal.SIGKILL)
    os.waitpid(self._process, 0)
    os.close(self._in)
    os.close(self._out)
    self._folder.cleanup()

  def _messages(self):
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
      while b'\0' in self._buffer:
        text, _, self._buffer = self._buffer.partition(b'\0')
        yield json.loads(text)
      try:
        read = os.read(self._in, 1 << 20)
      except BlockingIOError:
        time.sleep(0.005)
        continue
      if not read:
        raise RuntimeError('Chromium ended')
      self._buffer += read
    raise TimeoutError('Chromium does not answer')

  def call(self, method, **parameters):
    """The result of a command of the DevTools protocol."""
    number = next(self._numbers)
    message = {'id': number, 'method': method, 'params': parameters}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._out, json.dumps(message).encode() + b'\0')
    for answer in self._messages():
      if answer.get('id') == number:
        if 'error' in answer:
          raise RuntimeError(f'{method}: {answer["error"]["message"]}')
        return answer['result']
      self.events.append(answer)

  def open(self, path, *, width, theme):
    """Opens a file in a window of this width, and waits until it is loaded."""
    self.call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=900,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    self.call(
      'Emulation.setEmulatedMedia',
      features=[{'name': 'prefers-color-scheme', 'value': theme}],
    )
    self.events.clear()
    self.call('Page.navigate', url=path.absolute().as_uri())
    for event in self._messages():
      self.events.append(event)
      if event.get('method') == 'Page.loadEventFired':
        return

  def evaluate(self, expression):
    """The value of a JavaScript expression in the page."""
    result = self.call(
      'Runtime.evaluate', expression=expression, returnByValue=True
    )
    return result['result'].get('value')

  def screenshot(self, path):
    """Writes a PNG of the whole page."""
    shot = self.call('Page.captureScreenshot', captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(shot['data']))

  def pdf(self, path):
    """Prints the page."""
    printed = self.call('Page.printToPDF', preferCSSPageSize=True)
    path.write_bytes(base64.b64decode(printed['data']))
