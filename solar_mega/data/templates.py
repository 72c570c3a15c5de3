r"""The chat templates that come with the project, as Jinja.

Alpaca's two forms, without and with an input, are those of the instruction data's authors and of the paper
(section 4.1). What they leave open is settled here: a system message takes the place of the opening sentence;
later turns repeat "### Instruction:" after an empty line; every response is closed by EOS. The response
follows "### Response:" without a space or newline between, as in Alpaca's own training.

SOLAR's is that of the released SOLAR-10.7B-Instruct, with BOS before and EOS after every assistant turn,
which the release leaves to its tokenizer.

`{% generation %}` marks what the assistant writes; transformers understands it.
"""

ALPACA = r"""{{- bos_token }}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if not (loop.first or (loop.index0 == 1 and messages[0]['role'] == 'system')) %}
            {{- '\n\n' }}
        {%- elif system %}
            {{- system + '\n\n' }}
        {%- elif message['input'] %}
            {{- 'Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n' }}
        {%- else %}
            {{- 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n' }}
        {%- endif %}
        {{- '### Instruction:\n' + message['content'] }}
        {%- if message['input'] %}
            {{- '\n\n### Input:\n' + message['input'] }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- '\n\n### Response:' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\n### Response:' }}
{%- endif %}
"""  # noqa: E501

SOLAR = r"""{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if message['content'] %}
            {{- '### System:\n' + message['content'] + '\n\n' }}
        {%- endif %}
    {%- elif message['role'] == 'user' %}
        {{- '### User:\n' + message['content'] + '\n\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '### Assistant:\n' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
        {%- if not loop.last %}
            {{- '\n\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Assistant:\n' }}
{%- endif %}
"""

BUILT_IN = {"alpaca": ALPACA, "solar": SOLAR}
"""By the name that configurations use."""
