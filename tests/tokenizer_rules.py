"""Rules of a tokenizer.json, of which some end the tokenizers library."""

TEXT = {"Sequence": {"id": "A", "type_id": 0}}
SECOND = {"Sequence": {"id": "B", "type_id": 0}}
SPECIAL = {"SpecialToken": {"id": "x", "type_id": 0}}


def template(ids, single=(TEXT, SPECIAL)):
    special = {"x": {"id": "x", "ids": ids, "tokens": ["x"] * len(ids)}}
    return {
        "type": "TemplateProcessing",
        "single": list(single),
        "pair": [TEXT, SECOND],
        "special_tokens": special,
    }


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replace(pattern, content, count):
    rule = {"type": "Replace", "pattern": pattern, "content": content}
    return sequence("normalizers", rule, count)


def sequence(kind, rule, count):
    return {"type": "Sequence", kind: [rule] * count}
