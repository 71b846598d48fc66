#!/usr/bin/env python3
"""Converts the easy-vqa 1.0 wheel to folder data sets: TARGET/{train,test}/{metadata.jsonl,images/*.png}.

The package has questions and answers but no captions. A caption is derived from the questions and answers
about its picture, not from the pixels:

  - an answer to "what shape ..." or "what color ..." names the shape or the colour;
  - a question names them too: "what color is the circle?" is asked about circles only;
  - "is there a red shape?" yes, and "is there not a red shape?" no, both mean red;
  - if all shapes (or colours) but one are denied, it is the remaining one.

With shape and colour the caption is "a red circle", with one of them "a circle" or "a red shape"; with neither there is
no caption.
"""

import argparse
import collections
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
THING = r"(?P<thing>\w+(?: shape)?)"
# (form, whether "yes" means that the thing is present; None for a question that asks "what")
FORMS = [
    (re.compile(form.replace("THING", THING) + r"\?"), yes)
    for form, yes in [
        (r"what shape (?:is in the image|does the image contain|is present)", None),
        (r"what is the THING", None),
        (r"what color is the THING", None),
        (r"what is the color of the THING", None),
        (r"is there a THING(?: in the image)?", True),
        (r"does the image contain a THING", True),
        (r"is a THING present", True),
        (r"is there not a THING(?: in the image)?", False),
        (r"does the image not contain a THING", False),
        (r"is no THING present", False),
    ]
]


class Facts:
    """The facts known about a picture: the shapes and colours that are still possible."""

    def __init__(self):
        self.left = {SHAPES: set(SHAPES), COLOURS: set(COLOURS)}

    def add(self, word, true):
        word = word.removesuffix(" shape")
        for kind in (SHAPES, COLOURS):
            if word in kind:
                self.left[kind] &= {word} if true else set(kind) - {word}

    def read(self, question, answer):
        for form, yes in FORMS:
            match = form.fullmatch(question)
            if not match:
                continue
            thing = match.groupdict().get("thing") or ""
            if yes is None:
                if answer not in SHAPES + COLOURS:
                    sys.exit(f"unexpected answer {answer!r} to {question!r}")
                self.add(answer, True)
                self.add(thing, True)
            elif answer in ("yes", "no"):
                self.add(thing, (answer == "yes") == yes)
            else:
                sys.exit(f"unexpected answer {answer!r} to {question!r}")
            return
        sys.exit(f"unexpected question {question!r}")

    def caption(self):
        shape, colour = (next(iter(s)) if len(s) == 1 else None for s in self.left.values())
        if not shape and not colour:
            return None
        return " ".join(word for word in ("a", colour, shape or "shape") if word)


def lay_out(wheel, split, target):
    base = f"easy_vqa/data/{split}/"
    questions = collections.defaultdict(list)
    for question, answer, image in json.loads(wheel.read(base + "questions.json")):
        questions[image].append((question, answer))
    names = {int(name.split("/")[-1][:-4]): name for name in wheel.namelist()
             if name.startswith(base + "images/") and name.endswith(".png")}
    os.makedirs(os.path.join(target, "images"))
    captions, answers, partial = collections.Counter(), collections.Counter(), 0
    with open(os.path.join(target, "metadata.jsonl"), "w", encoding="utf-8") as out:
        for image in sorted(names):
            with open(os.path.join(target, "images", f"{image}.png"), "wb") as png:
                png.write(wheel.read(names[image]))
            facts = Facts()
            for question, answer in questions[image]:
                facts.read(question, answer)
                answers[answer] += 1
            if not all(facts.left.values()):
                sys.exit(f"{split} image {image}: its answers contradict each other")
            line = {"file_name": f"images/{image}.png"}
            caption = facts.caption()
            if caption:
                line["text"] = caption
                captions[caption] += 1
                partial += len(caption.split()) < 3 or caption.endswith(" shape")
            line["qa"] = questions[image]
            out.write(json.dumps(line) + "\n")
    total = sum(answers.values())
    top, count = answers.most_common(1)[0]
    yes_no = answers["yes"] + answers["no"]
    print(f"{split}: {len(names)} images, {sum(captions.values())} with a caption "
          f"({len(captions)} distinct, {partial} of only a shape or a colour), "
          f"{len(names) - sum(captions.values())} without")
    print(f"{split}: {total} questions, {total / len(names):.1f} an image, {len(answers)} answers, "
          f"{100 * yes_no / total:.1f}% yes or no; the most frequent is {top!r} ({100 * count / total:.1f}%)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", help="easy_vqa-1.0-py3-none-any.whl")
    parser.add_argument("target", help="folder to make")
    parser.add_argument("--sha256", help="fail if the wheel has another checksum")
    args = parser.parse_args()
    with open(args.wheel, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if args.sha256 and found != args.sha256:
        sys.exit(f"{args.wheel}: sha256 is {found}, wanted {args.sha256}")
    with zipfile.ZipFile(args.wheel) as wheel:
        licence = wheel.read("easy_vqa-1.0.dist-info/LICENSE").decode()
        print(licence.strip(), end="\n\n")
        for split in ("train", "test"):
            # Written to a temporary folder and renamed, so that an interrupted run leaves no partial data set.
            final = os.path.join(args.target, split)
            part = final + ".part"
            if os.path.isfile(os.path.join(final, "metadata.jsonl")):
                print(f"{final} exists already")
                continue
            if os.path.exists(final):
                sys.exit(f"{final} exists and is not this data set; choose another target or remove it")
            shutil.rmtree(part, ignore_errors=True)
            lay_out(wheel, split, part)
            os.rename(part, final)
        with open(os.path.join(args.target, "LICENSE"), "w", encoding="utf-8") as out:
            out.write(licence)


if __name__ == "__main__":
    main()
