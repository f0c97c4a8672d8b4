"""Files that hallucination is measured on, in the published forms."""

from __future__ import annotations

import json

import pytest
from models import picture

from vlmscope.data.published.objects import coco, pope
from vlmscope.errors import DataError


@pytest.fixture
def images(tmp_path):
    picture(1).save(tmp_path / "COCO_val2014_000000000001.jpg")
    return tmp_path


def test_instances_of_coco(images, tmp_path):
    file = tmp_path / "instances_val2014.json"
    file.write_text(
        json.dumps(
            {
                "images": [
                    {"id": 1, "file_name": "COCO_val2014_000000000001.jpg"},
                    {"id": 2, "file_name": "gone.jpg"},
                ],
                "annotations": [
                    {"image_id": 1, "category_id": 3},
                    {"image_id": 1, "category_id": 10},
                    {"image_id": 2, "category_id": 3},
                ],
                "categories": [{"id": 3, "name": "car"}, {"id": 10, "name": "traffic light"}],
            }
        )
    )
    [one], names = coco(file, images)
    assert one.shows == {"car", "traffic light"} and names == ["car", "traffic light"]
    assert one.clean_image.is_file()
    with pytest.raises(DataError, match="none of the 2 pictures of instances_val2014.json is there"):
        coco(file, tmp_path / "nowhere")
    file.write_text("[]")
    with pytest.raises(DataError, match="not COCO's instances"):
        coco(file, images)


def test_questions_of_pope(images, tmp_path):
    file = tmp_path / "coco_pope_random.json"
    ask = {"image": "COCO_val2014_000000000001.jpg", "text": "Is there a car in the image?"}
    rows = [
        {"question_id": 1, **ask, "label": "yes"},
        {"question_id": 2, **ask, "image": "gone.jpg", "label": "no"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    [one] = pope(file, images)
    assert (one.id, one.clean_prompt, one.answer, one.foil) == ("1", ask["text"], "yes", "no")
    file.write_text(json.dumps({**ask, "label": "maybe"}))
    with pytest.raises(DataError, match="not a file of POPE.*'maybe' in line 1"):
        pope(file, images)
    with pytest.raises(DataError, match="no such file; expected a file of POPE"):
        pope(tmp_path / "none.json", images)
