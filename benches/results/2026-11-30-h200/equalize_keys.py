"""equalize_keys.py IN.gguf OUT.gguf [STUDENT OUT_STUDENT]: scales key channels of Qwen2 to alike ranges, RoPE pair by RoPE pair, and queries by the inverse."""
import json, os, shutil, struct, sys
import numpy as np
TYPES={0:(1,4),1:(1,2),6:(32,22),8:(32,34),2:(32,18),3:(32,20),7:(32,24)}
def read(path):
    f=open(path,'rb'); d=f.read(24); magic,ver,nt,nk=struct.unpack('<IIQQ',d)
    def s():
        n=struct.unpack('<Q',f.read(8))[0]; return f.read(n)
    def val(t):
        if t==8: return s()
        if t==9:
            et,n=struct.unpack('<IQ',f.read(12)); return [val(et) for _ in range(n)]
        sz={0:1,1:1,2:2,3:2,4:4,5:4,6:4,7:1,10:8,11:8,12:8}[t]; b=f.read(sz)
        return struct.unpack({0:'<B',1:'<b',2:'<H',3:'<h',4:'<I',5:'<i',6:'<f',7:'<?',10:'<Q',11:'<q',12:'<d'}[t],b)[0]
    kv={}
    for _ in range(nk):
        k=s().decode(); t=struct.unpack('<I',f.read(4))[0]; kv[k]=val(t)
    T={}
    for _ in range(nt):
        n=s().decode(); dimensions=struct.unpack('<I',f.read(4))[0]; dims=struct.unpack('<%dQ'%dimensions,f.read(8*dimensions)); ty,off=struct.unpack('<IQ',f.read(12)); T[n]=(dims,ty,off)
    al=kv.get('general.alignment',32); base=(f.tell()+al-1)//al*al
    return kv,T,base
def main():
    src,dst=sys.argv[1:3]; kv,T,base=read(src)
    data=np.fromfile(src,dtype=np.uint8)
    def raw(n):
        dims,ty,off=T[n]; blk,by=TYPES[ty]; rows=int(np.prod(dims[1:])) if len(dims)>1 else 1
        rb=dims[0]//blk*by; return data[base+off:base+off+rows*rb].reshape(rows,rb),ty,blk,by
    def deq(n):
        r,ty,blk,by=raw(n)
        if ty==0: return r.view(np.float32)
        b=r.reshape(r.shape[0],-1,by); d=b[...,:2].copy().view(np.float16).astype(np.float32)
        if ty==8: return (b[...,2:].view(np.int8)*d).reshape(r.shape[0],-1)
        assert ty==6,ty
        qh=b[...,2:6].copy().view(np.uint32); qs=b[...,6:]
        hi=((qh>>np.arange(32,dtype=np.uint32))&1)<<4
        lo=np.concatenate([qs&15,qs>>4],-1)
        return ((lo|hi).astype(np.float32)-16).__mul__(d).reshape(r.shape[0],-1)
    def scale_rows(n,s):
        r,ty,blk,by=raw(n)
        if ty==0:
            v=r.view(np.float32); v*= s if v.shape[0]==1 else s[:,None]; return
        b=r.reshape(r.shape[0],-1,by); d=b[...,:2].copy().view(np.float16).astype(np.float32)[...,0]*s[:,None]
        b[...,:2]=d.astype(np.float16)[...,None].copy().view(np.uint8)
    H,K,D,Lay=14,2,64,24
    S={}
    for L in range(Lay):
        W=deq(f'blk.{L}.attn_k.weight'); b=deq(f'blk.{L}.attn_k.bias').ravel(); g=deq(f'blk.{L}.attn_norm.weight').ravel()
        sd=np.linalg.norm(W*g,axis=1)
        s=np.empty(K*D,np.float32)
        for h in range(K):
            B,Q=b[h*D:(h+1)*D],sd[h*D:(h+1)*D]
            mag=np.sqrt(B[:32]**2+B[32:]**2)+2*np.sqrt(Q[:32]**2+Q[32:]**2)
            rms=np.sqrt((B**2+Q**2).sum()/64); eqr=np.sqrt((((B**2+Q**2)/np.tile(mag,2)**2).sum())/64)
            s[h*D:(h+1)*D]=np.tile(mag,2)*(eqr/rms)
        # powers of two: exact in every format
        s=2.0**np.round(np.log2(s)); S[L]=s
        scale_rows(f'blk.{L}.attn_k.weight',1/s); scale_rows(f'blk.{L}.attn_k.bias',1/s)
        qs=np.concatenate([s[h*K//H*D:(h*K//H+1)*D] for h in range(H)])
        scale_rows(f'blk.{L}.attn_q.weight',qs); scale_rows(f'blk.{L}.attn_q.bias',qs)
    data.tofile(dst)
    print('scales', {L:(S[L].min(),S[L].max()) for L in (0,1,3,9,16,23)})
    if len(sys.argv)>3:
        a,o=sys.argv[3:5]; shutil.rmtree(o,ignore_errors=True); shutil.copytree(a,o)
        p=o+'/student.safetensors'; buf=bytearray(open(p,'rb').read()); n=struct.unpack('<Q',buf[:8])[0]; h=json.loads(buf[8:8+n])
        def arr(k):
            i=h[k]; x,y=i['data_offsets']; return np.frombuffer(buf,dtype={'F16':np.float16,'F32':np.float32}[i['dtype']],count=(y-x)//(2 if i['dtype']=='F16' else 4),offset=8+n+x).reshape(i['shape'])
        for L in range(Lay):
            s=S[L]; pre=f'model.layers.{L}.self_attn.'
            qs=np.concatenate([s[hh*K//H*D:(hh*K//H+1)*D] for hh in range(H)])
            k=arr(pre+'k_proj.lora_B.weight'); k/=s[:,None].astype(k.dtype)
            q=arr(pre+'q_proj.lora_B.weight'); q*=qs[:,None].astype(q.dtype)
            for j in range(K):
                w=arr(pre+f'feature_map_k.mlp.linears.{j}.weight'); w*=s[j*D:(j+1)*D][None,:].astype(w.dtype)
            for j in range(H):
                w=arr(pre+f'feature_map_q.mlp.linears.{j}.weight'); w/=qs[j*D:(j+1)*D][None,:].astype(w.dtype)
        import hashlib
        open(p,'wb').write(buf)
main()
