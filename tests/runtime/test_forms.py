"""What a JSON file holds, against a form."""

import json
from pathlib import Path

import pytest

from lorapr_jax.errors import UserError
from lorapr_jax.runtime import forms

FORM = {
  'name': forms.TEXT,
  'parts?': [{'size': forms.COUNT}],
  'by_name?': forms.Each(forms.Maybe(forms.NUMBER)),
}


@pytest.mark.parametrize(
  'text',
  [
    '{"name": "", "more": [1]}',
    '{"name": "a", "parts": [{"size": 1}, {"size": 2}], "by_name": {}}',
    '{"name": "a", "parts": [], "by_name": {"x": null, "y?": -0.5}}',
  ],
)
def test_what_has_the_form_passes(text):
  forms.check_form(json.loads(text), FORM, Path('a.json'))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('[]', 'a.json: all is [], not an object'),
    ('{}', 'a.json is none of ours: it has no name'),
    ('{"name": null}', 'a.json: name is None, not text'),
    ('{"name": "", "parts": {}}', 'a.json: parts is {}, not a list'),
    (
      '{"name": "", "parts": [{"size": 1}, {"size": 0}]}',
      'a.json: parts.1.size is 0, not a whole number from 1',
    ),
    (
      '{"name": "", "parts": [{}]}',
      'a.json is none of ours: it has no parts.0.size',
    ),
    (
      '{"name": "", "by_name": {"y?": true}}',
      'a.json: by_name.y? is True, not a finite number',
    ),
  ],
)
def test_the_first_place_that_has_not_is_named(text, message):
  with pytest.raises(UserError) as caught:
    forms.check_form(json.loads(text), FORM, Path('a.json'))
  assert str(caught.value) == message


@pytest.mark.parametrize(
  ('leaf', 'held'),
  [
    (forms.MEASURED, '-1 0 1 0.5 2.0 1e300 NaN Infinity'),
    (forms.NUMBER, '-1 0 1 0.5 2.0'),
    (forms.POSITIVE, '1 0.5 2.0'),
    (forms.SHARE, '0 1 0.5'),
    (forms.INTEGER, '-1 0 1'),
    (forms.INDEX, '0 1'),
    (forms.COUNT, '1'),
    (forms.FLAG, 'true'),
    (forms.TEXT, '"1"'),
  ],
)
def test_a_leaf_holds_its_values_alone(leaf, held):
  tried = '-1 0 1 0.5 2.0 1e300 NaN Infinity true null "1" [] {} ' + '9' * 400
  found = [text for text in tried.split() if leaf.holds(json.loads(text))]
  assert found == held.split()
