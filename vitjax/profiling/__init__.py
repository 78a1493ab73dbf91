"""`vitjax train --profile`: a trace around steady steps, and where their time goes."""
