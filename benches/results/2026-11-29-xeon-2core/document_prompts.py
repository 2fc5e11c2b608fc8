"""Right answers about a document by the form of the question: `document_prompts.py FORMS SEEDS WORDS`, next to a `still`."""
import subprocess,json,os
import random,sys
SUBJECTS="the committee|the mayor's office|the museum|the old mill|the ferry company|the market hall|the school board|the river authority|the gardeners' club|the town council|the post office|the fishing fleet|the weather station|the orchestra|the bakery on the corner|the hospital".split("|")
VERBS="announced|considered|repaired|discussed|opened|described|planned|visited|measured|praised|replaced|studied|postponed|celebrated|inspected|photographed".split("|")
OBJECTS="the northern road|a new roof for the pavilion|the state of the harbour wall|an exhibition of maps|the summer timetable|the water level|a collection of letters|the flower beds|the winter festival|a row of benches|the boat house|the footpath along the canal|a set of drawings|the reading room|the school garden|the clock in the square".split("|")
WHEN="in early spring|after a long debate|during the autumn|without much notice|with help from volunteers|before the holidays|on a rainy morning|at the end of the month|for the second time|as part of a larger plan|to the surprise of many residents|despite the cold weather|with great care|over several weeks|late in the afternoon|under a clear sky".split("|")
TAILS="Few people expected this.|Residents were pleased with the result.|The details were published in the local paper.|It took longer than planned.|Several neighbours offered to help.|A short report was written afterwards.|The costs were lower than feared.|Nobody objected.".split("|")
FACTS=[
("The research ship of the institute is called the Silver Heron.","What is the research ship of the institute called?","Silver Heron"),
("The treasurer of the sailing club is Maria Okafor.","Who is the treasurer of the sailing club?","Okafor"),
("The code for the door of the archive is 7342.","What is the code for the door of the archive?","7342"),
("The stone bridge was completed in 1887.","When was the stone bridge completed?","1887"),
("The lighthouse at the point is painted green.","What color is the lighthouse at the point?","green"),
("The library has a yearly budget of 45,000 pounds.","What is the yearly budget of the library?","45,000"),
("The oldest tree in the park is a chestnut.","What kind of tree is the oldest tree in the park?","chestnut"),
("The chess club meets every Thursday evening.","On which day does the chess club meet?","Thursday"),
("Dr. Lindqvist discovered the Roman coins in the cellar.","Who discovered the Roman coins in the cellar?","Lindqvist"),
("The night train to Norwich leaves from platform nine.","From which platform does the night train to Norwich leave?","nine|9"),
]
def doc(seed,words):
    r=random.Random(seed); facts=FACTS[:]; r.shuffle(facts)
    sentences=[]; n=0
    while n<words:
        s=f"{r.choice(SUBJECTS)} {r.choice(VERBS)} {r.choice(OBJECTS)} {r.choice(WHEN)}."
        s=s[0].upper()+s[1:]
        if r.random()<.3: s+=" "+r.choice(TAILS)
        sentences.append(s); n+=len(s.split())
    # facts, evenly spread
    step=len(sentences)/len(facts)
    for i,f in reversed(list(enumerate(facts))):
        sentences.insert(int((i+.5)*step),f[0])
    paras=[]
    while sentences:
        k=r.randint(4,8); paras.append(" ".join(sentences[:k])); sentences=sentences[k:]
    return "\n\n".join(paras)

M=os.path.expanduser("~/.cache/still/SmolLM2-135M-Instruct.Q4_1.gguf")
FORMS={ # system, before, (question format)
"A now":(None,"{d}","{q}"),
"B Document/Question":(None,"Document:\n{d}","Question: {q}"),
"C instruction after":(None,"{d}","Answer the question using the text above.\nQuestion: {q}"),
"D instr before+after, Answer:":(None,"Read the document and answer the question after it in one short sentence.\n\nDocument:\n{d}","Question: {q}\nAnswer:"),
"E using only":(None,"{d}","Using only the text above, answer this question in one sentence: {q}"),
"F tags":(None,"<document>\n{d}\n</document>","{q}"),
}
FORMS.update({
"I C+system":("You answer questions about a text.","{d}","Answer the question using the text above.\nQuestion: {q}"),
"J C quote":(None,"{d}","Answer the question using the text above. Quote the sentence that answers it.\nQuestion: {q}"),
"K repeat sentence":(None,"{d}","Repeat the sentence of the text above that answers the question.\nQuestion: {q}"),
"L Text + C + Answer:":(None,"Text:\n{d}","Answer the question using the text above.\nQuestion: {q}\nAnswer:"),
})
def main(forms,seeds,words,extra):
    for name in forms:
        system,before,q=FORMS[name]; right=0; total=0; wrong=[]
        for seed in seeds:
            d=doc(seed,words); open("d.txt","w").write(before.format(d=d))
            if os.path.exists("d.still"): os.remove("d.still")
            sys_=["--system",system] if system else []
            first=True
            for (_,question,answer) in FACTS:
                qq=q.format(q=question)
                cmd=["./still","ask","-q","--model",M,"--session","d.still","-n","40","--json"]+extra
                if first: cmd+=["--file","d.txt"]+sys_
                first=False
                out=subprocess.run(cmd+[qq],capture_output=True,text=True)
                if out.returncode: print(out.stderr); return
                text=json.loads(out.stdout)["text"]
                ok=any(a.lower() in text.lower() for a in answer.split("|"))
                right+=ok; total+=1
                if not ok: wrong.append((question,text[:100]))
        print(f"{name}: {right}/{total}",flush=True)
        for w in wrong[:6]: print("    ",w,flush=True)
if __name__=="__main__":
    forms=[f for f in FORMS if not sys.argv[1] or f[0] in sys.argv[1]]
    main(forms,[int(x) for x in sys.argv[2].split(",")],int(sys.argv[3]),sys.argv[4:])
